"""GPT, GPTHF and hourglass at equal parameters: decoding, FLOPs a token and bytes of keys and values, from one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from thoughtformer.bench.flops import count_flops
from thoughtformer.bench.records import Record
from thoughtformer.bench.running import Options, measured, next_ids
from thoughtformer.bench.shapes import DEEP, SENTENCE_TOKENS, Size
from thoughtformer.bench.synthetic import filled_cache
from thoughtformer.bench.timing import Run, memory_read_rate, seconds_of
from thoughtformer.cache import GPTHFCache
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.gpthf.modeling import compile_steps
from thoughtformer.models.packed_linear import pack_weights

__all__ = ["Work", "architectures", "compared", "decode_flops"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One comparison: a batch that holds a context, and decodes whole sentences."""

    size: str
    layers: int
    batch: int
    context: int
    sentences: int

    @property
    def workload(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "context": self.context,
            "new_tokens": self.sentences * SENTENCE_TOKENS,
            "size": self.size,
            "layers": self.layers,
        }

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.batch} rows of {self.context:,} tokens"


def architectures(options: Options) -> Iterator[Record]:
    """Tokens a second of one row, compiled and not, and of a batch, and the bytes and FLOPs that a token needs."""
    size = options.size
    context, batch = size.decode_contexts[1], size.decode_batch
    deep = DEEP if size.name == "full" else replace(size, name="deep", layers=6)
    short = 512 if deep is DEEP else 64
    # To see that all runs, one compilation of the longest way, without the middle work, will do.
    is_toy = size.name == "toy"
    for shape, rows, length, sentences in ((deep, 1, short, 2), (size, 1, context, 2), (size, batch, context, 1)):
        if is_toy and shape is size and rows == 1:
            continue
        work = Work(size=shape.name, layers=shape.layers, batch=rows, context=length, sentences=sentences)
        models = _models(shape)
        pack_weights(models["gpt"])
        compiles = tuple(models)[-1:] if is_toy else ("",)
        yield from compared(
            "architectures",
            models,
            work,
            repeats=options.repeats,
            compiles=compiles if rows == 1 else (),
            on_progress=options.on_progress,
        )


def _models(size: Size) -> dict[str, GPTHFForCausalLM]:
    """One set of weights: every model's layers are the plain GPT's, so that all fit into memory side by side."""
    gpt = size.gpt()
    ends, layers = max(1, size.layers // 8 if size.layers == 24 else size.layers // 6), size.layers
    encoder = max(1, layers // 3)
    models = {"gpt": gpt}
    for visibility in ("fast", "hybrid"):
        split = (encoder, layers - encoder)
        models[f"{visibility} {_name(split)}"] = _sharing(gpt, lambda: size.gpthf(split, visibility))  # noqa: B023
    hourglass = (ends, layers - 2 * ends, ends)
    models[f"hourglass {_name(hourglass)}"] = _sharing(gpt, lambda: size.gpthf(hourglass, "fast"))
    for name, changes in (
        ("window of 8", {"recent_sentences": 8}),
        ("2 summaries", {"summaries_per_sentence": 2}),
    ):
        models[f"hourglass {_name(hourglass)}, {name}"] = _sharing(
            gpt,
            lambda: size.gpthf(hourglass, "fast", **changes),  # noqa: B023
        )
    return models


def _name(split: tuple[int, ...]) -> str:
    return "+".join(map(str, split))


def _sharing(gpt: GPTHFForCausalLM, build: Callable[[], GPTHFForCausalLM]) -> GPTHFForCausalLM:
    """A model with the weights of `gpt`, layer by layer; its own are those of further summaries alone."""
    with torch.device("meta"):
        model = build()
    layers = list(gpt.model.stages[0].layers)  # type: ignore[union-attr, arg-type]
    for stage in model.model.stages:
        count = len(stage.layers)  # type: ignore[arg-type]
        stage.layers = nn.ModuleList(layers[:count])
        layers = layers[count:]
    model.model.embed_tokens, model.model.norm, model.lm_head = gpt.model.embed_tokens, gpt.model.norm, gpt.lm_head
    summaries = model.model.summary_tokens
    if summaries is not None:
        model.model.summary_tokens = nn.Embedding(summaries.num_embeddings, summaries.embedding_dim)
    return model


def compared(
    case: str,
    models: Mapping[str, GPTHFForCausalLM],
    work: Work,
    *,
    repeats: int,
    compiles: tuple[str, ...] = (),
    on_progress: Callable[[str], None],
) -> Iterator[Record]:
    """All models in turns, one record each; those whose names start with one of `compiles` also compiled."""
    runs: dict[str, Run] = {"memory": lambda: {"bytes_per_second": memory_read_rate()}} if work.batch == 1 else {}
    settings: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        needed = _needed(model, work)
        runs[name] = lambda model=model, needed=needed: _decoded(model, work, is_compiled=False) | needed
        settings[name] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        if not name.startswith(compiles):
            continue
        on_progress(f"compiling {name} of {work.layers} layers")
        try:
            # A step that torch gave up compiling would run as it is, and be called compiled.
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                _decoded(model, replace(work, sentences=2), is_compiled=True)
        except TorchDynamoException as error:
            why = f"torch.compile failed: {' '.join(str(error).split())[:200]}"
            yield Record(theme="speed", case=case, peer=f"{name}, compiled", workload=work.workload, skipped=why)
            continue
        runs[f"{name}, compiled"] = lambda model=model, needed=needed: _decoded(model, work, is_compiled=True) | needed
    yield from measured(
        case,
        work.workload,
        runs,
        settings,
        repeats=repeats,
        on_run=lambda name, number: on_progress(f"{work}: {name}, round {number}"),
    )


@torch.inference_mode()
def _decoded(model: GPTHFForCausalLM, work: Work, *, is_compiled: bool) -> dict[str, float]:
    """Decodes whole sentences, so that what happens once a sentence is counted in proportion."""
    compile_steps(model, enabled=is_compiled)
    new_tokens = work.sentences * SENTENCE_TOKENS
    cache = filled_cache(model, num_rows=work.batch, context=work.context, reserve_tokens=work.context + new_tokens + 4)
    rows = torch.arange(work.batch)

    def step(position: int) -> None:
        # Rows close their sentences at different steps, as rows of a batch do.
        ids = [next_ids(model, 1, position + row * SENTENCE_TOKENS // work.batch) for row in range(work.batch)]
        model.ragged_logits(torch.cat(ids), rows, cache, num_columns=1)

    for position in range(work.context, work.context + 3):
        step(position)
    first = work.context + 3
    seconds = seconds_of(lambda: [step(position) for position in range(first, first + new_tokens)])
    compile_steps(model, enabled=False)
    # A plain GPT needs no sentence ends: all it writes is text.
    text = work.batch * (new_tokens if _is_plain(model) else new_tokens - work.sentences)
    return {
        "text_tokens_per_second": text / seconds,
        "tokens_per_second": work.batch * new_tokens / seconds,
        "kv_bytes": float(cache.num_bytes()),
    }


def _is_plain(model: GPTHFForCausalLM) -> bool:
    return model.config.num_encoder_layers == 0


@torch.inference_mode()
def decode_flops(model: GPTHFForCausalLM, context: int) -> float:
    """FLOPs of a generated token, the mean over a sentence of 25 that starts at `context`."""
    cache = filled_cache(model, num_rows=1, context=context, reserve_tokens=context + 2 * SENTENCE_TOKENS)
    with count_flops() as counted:
        for position in range(context, context + SENTENCE_TOKENS):
            model.ragged_logits(next_ids(model, 1, position), torch.arange(1), cache, num_columns=1)
    return counted.total / SENTENCE_TOKENS


@torch.inference_mode()
def _needed(model: GPTHFForCausalLM, work: Work) -> dict[str, float]:
    """FLOPs that one row's token takes, and bytes that a step of the batch must touch, over a sentence."""
    cache = filled_cache(model, num_rows=1, context=work.context, reserve_tokens=work.context + 2 * SENTENCE_TOKENS)
    touched = 0.0
    for position in range(work.context, work.context + SENTENCE_TOKENS):
        touched += _touched(model, cache, work.batch)
        model.ragged_logits(next_ids(model, 1, position), torch.arange(1), cache, num_columns=1)
    return {"flops": decode_flops(model, work.context), "touched_bytes": touched / SENTENCE_TOKENS}


def _touched(model: GPTHFForCausalLM, cache: GPTHFCache, batch: int) -> float:
    """Weights once, and each row's keys and values; what an hourglass's body reads, in a sentence's share."""
    total = float(sum(parameter.nbytes for parameter in model.lm_head.parameters()))
    is_hourglass = model.config.num_decoder_layers > 0
    for stage in model.model.stages:
        # Rows of a batch close sentences at different steps, and each time the body's weights are read.
        share = min(1.0, batch / SENTENCE_TOKENS) if is_hourglass and stage.name == "body" else 1.0
        total += share * sum(parameter.nbytes for parameter in stage.parameters())
    for stage_cache in cache.stages:
        share = 1 / SENTENCE_TOKENS if is_hourglass and stage_cache.name == "body" else 1.0
        if stage_cache.name == "memory":
            # Summaries pass the decoder's key and value projections.
            width = model.config.hidden_size * model.lm_head.weight.element_size()
            kv_weights = sum(2 * part.shape[1] * part.shape[3] * width for part in stage_cache.keys)
            total += min(1.0, batch / SENTENCE_TOKENS) * kv_weights
        entry = sum(
            part.shape[1] * part.shape[3] * part.element_size() for part in (*stage_cache.keys, *stage_cache.values)
        )
        total += share * batch * stage_cache.longest * entry
    return total

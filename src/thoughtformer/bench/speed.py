"""Speed: prefill, decoding and whole requests, ours beside peers with KV caches, on the same weights or shape."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from thoughtformer.bench.flops import regular_ids
from thoughtformer.bench.peers import PeerProcess, find_peer
from thoughtformer.bench.peers.environments import PEERS
from thoughtformer.bench.records import Record
from thoughtformer.bench.shapes import SENTENCE_TOKENS, Size
from thoughtformer.bench.synthetic import filled_cache, filled_dynamic_cache
from thoughtformer.bench.timing import Run, interleaved, memory_read_rate, seconds_of
from thoughtformer.decode import SamplingParams
from thoughtformer.engine import Engine
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.export import as_llama, write_gguf
from thoughtformer.models.layers import compile_steps
from thoughtformer.models.linear import pack_weights

__all__ = ["CASES", "Options"]

#: Contexts above this are for the project's own models: the others' prefill is the plain GPT's, over again.
LONGEST_PEER_CONTEXT = 4096
#: Of the memory that is free, what caches may take.
USABLE_MEMORY = 0.93


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Attributes:
        repeats: timed rounds; fewer for contexts past 8,192 tokens, whose runs take minutes.
        contexts: instead of the size's own.
        on_progress: told what runs.
    """

    size: Size
    repeats: int = 5
    contexts: tuple[int, ...] | None = None
    on_progress: Callable[[str], None] = field(default=lambda text: None)

    def rounds(self, context: int) -> tuple[int, int]:
        """Timed rounds and warm-ups for a context."""
        return (self.repeats, 1) if context <= 8192 else (max(1, self.repeats // 2), 0)


def _ids(model: GPTHFForCausalLM, count: int) -> list[int]:
    return regular_ids(count, sentence_tokens=SENTENCE_TOKENS, sentence_end_token_id=model.config.sentence_end_token_id)


def _split_name(split: tuple[int, int]) -> str:
    return f"gpthf {split[0]}+{split[1]}"


def _measured(
    case: str, workload: dict[str, Any], runs: dict[str, Run], settings: dict[str, dict[str, Any]], **how: Any
) -> list[Record]:
    """One record a peer."""
    figures = interleaved(runs, **how)
    return [
        Record(
            theme="speed",
            case=case,
            peer=name,
            workload=workload,
            metrics=metrics,
            settings=settings.get(name, {}),
        )
        for name, metrics in figures.items()
    ]


def _llama_cpp(stack: ExitStack, model: GPTHFForCausalLM, options: Options, context: int) -> PeerProcess | None:
    """llama.cpp on the same weights, if it is installed."""
    python = find_peer("llama-cpp")
    if python is None:
        return None
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    path = Path(folder) / "model.gguf"
    write_gguf(model, options.size.tokenizer(), path)
    process = stack.enter_context(PeerProcess(python, PEERS["llama-cpp"].worker, threads=torch.get_num_threads()))
    process.ask(ask="load", path=str(path), threads=torch.get_num_threads(), context=context)
    return process


def _missing_llama_cpp(case: str, workload: dict[str, Any]) -> Record:
    why = "not installed here: thoughtformer bench peers --install llama-cpp"
    return Record(theme="speed", case=case, peer="llama.cpp", workload=workload, skipped=why)


def prefill(options: Options) -> Iterator[Record]:
    """Time to read a prompt, up to the logits of its last token."""
    size = options.size
    contexts = options.contexts or size.contexts
    gpt = size.gpt()
    models = {_split_name(split): size.gpthf(split) for split in size.splits} | {"gpt": gpt}
    for model in models.values():
        pack_weights(model)
    llama = as_llama(gpt)
    with ExitStack() as stack:
        shared = [context for context in contexts if context <= LONGEST_PEER_CONTEXT]
        llama_cpp = _llama_cpp(stack, gpt, options, max(shared) + 8) if shared else None
        for context in contexts:
            workload = {"batch": 1, "context": context, "size": size.name}
            runs: dict[str, Run] = {}
            for name, model in models.items():
                runs[name] = _own_prefill(model, [_ids(model, context)])
            if context <= LONGEST_PEER_CONTEXT:
                ids = torch.tensor([_ids(gpt, context)])
                runs["transformers Llama"] = lambda ids=ids: {"seconds": seconds_of(lambda: _llama_prefill(llama, ids))}
                if llama_cpp is not None:
                    peer, listed = llama_cpp, ids[0].tolist()
                    runs["llama.cpp"] = lambda peer=peer, listed=listed: {
                        "seconds": peer.ask(ask="generate", ids=listed, new_tokens=1)["first_token_seconds"]
                    }
                else:
                    yield _missing_llama_cpp("prefill", workload)
            repeats, warmups = options.rounds(context)
            yield from _measured(
                "prefill",
                workload,
                runs,
                {},
                repeats=repeats,
                warmups=warmups,
                on_run=lambda name, number, context=context: options.on_progress(
                    f"prefill of {context:,} tokens: {name}, round {number}"
                ),
            )


def _own_prefill(model: GPTHFForCausalLM, rows: list[list[int]]) -> Run:
    """All rows at once, without padding."""
    ids = torch.tensor([token for row in rows for token in row])
    lengths = torch.tensor([len(row) for row in rows])
    wanted = torch.zeros(len(ids), dtype=torch.bool)
    wanted[lengths.cumsum(0) - 1] = True
    number = torch.arange(len(rows)).repeat_interleave(lengths)

    @torch.inference_mode()
    def work() -> None:
        model.ragged_logits(ids, number, model.new_cache(len(rows)), wanted=wanted)

    return lambda: {"seconds": seconds_of(work)}


@torch.inference_mode()
def _llama_prefill(llama: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    llama(ids, attention_mask=mask, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)


def decode(options: Options) -> Iterator[Record]:
    """Tokens a second of a batch that holds long contexts: caches filled without reading, one model after the other."""
    size, batch = options.size, options.size.decode_batch
    new_tokens = SENTENCE_TOKENS
    gpt = size.gpt()
    name = _split_name(size.splits[0])
    gpthf = size.gpthf(size.splits[0])
    for model in (gpt, gpthf):
        pack_weights(model)
    llama = as_llama(gpt)
    for context in options.contexts or size.decode_contexts:
        workload = {"batch": batch, "context": context, "new_tokens": new_tokens, "size": size.name}
        settings = {"gpt": {"cache": "preallocated"}, "transformers Llama": {"cache": "DynamicCache"}}
        runs: dict[str, Run] = {
            name: lambda context=context: _own_steps(gpthf, batch, context, new_tokens),
            "gpt": lambda context=context: _own_steps(gpt, batch, context, new_tokens),
            "transformers Llama": lambda context=context: _llama_steps(llama, gpt, batch, context, new_tokens),
        }
        needed = gpt.model.cache_bytes({"body": context + new_tokens + 4}, batch)
        for peer in ("gpt", "transformers Llama"):
            # transformers' cache is copied a layer at a time.
            peak = needed * (1 if peer == "gpt" else 1 + 2 / size.layers)
            free = _available_bytes() * USABLE_MEMORY
            if peak > free:
                del runs[peer]
                why = f"its cache needs {peak / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                yield Record(theme="speed", case="decode", peer=peer, workload=workload, skipped=why)
        repeats, _ = options.rounds(context)
        yield from _measured(
            "decode",
            workload,
            runs,
            settings,
            repeats=repeats,
            warmups=0,  # each run warms itself up
            on_run=lambda name, number, context=context: options.on_progress(
                f"decoding {batch} rows of {context:,} tokens: {name}, round {number}"
            ),
        )


def _available_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available


def _next_ids(model: GPTHFForCausalLM, batch: int, position: int) -> torch.Tensor:
    """The token that the regular text has at a position, for every row."""
    end = model.config.sentence_end_token_id
    is_end = end is not None and position % SENTENCE_TOKENS == SENTENCE_TOKENS - 1
    return torch.full((batch,), end if is_end and end is not None else _ids(model, 1)[0])


@torch.inference_mode()
def _own_steps(model: GPTHFForCausalLM, batch: int, context: int, new_tokens: int) -> dict[str, float]:
    warmups = 3
    cache = filled_cache(model, num_rows=batch, context=context, reserve_tokens=context + warmups + new_tokens)
    rows = torch.arange(batch)

    def step(position: int) -> None:
        model.ragged_logits(_next_ids(model, batch, position), rows, cache, num_columns=1)

    for position in range(context, context + warmups):
        step(position)
    first = context + warmups
    seconds = seconds_of(lambda: [step(position) for position in range(first, first + new_tokens)])
    return {"tokens_per_second": batch * new_tokens / seconds, "kv_bytes": float(cache.num_bytes())}


@torch.inference_mode()
def _llama_steps(
    llama: LlamaForCausalLM, gpt: GPTHFForCausalLM, batch: int, context: int, new_tokens: int
) -> dict[str, float]:
    cache = filled_dynamic_cache(gpt, num_rows=batch, context=context)
    ids = _next_ids(gpt, batch, 0)[:, None]

    def step() -> None:
        llama(ids, past_key_values=cache, use_cache=True)

    step()
    seconds = seconds_of(lambda: [step() for _ in range(new_tokens)])
    layers: list[Any] = cache.layers
    num_bytes = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    return {"tokens_per_second": batch * new_tokens / seconds, "kv_bytes": float(num_bytes)}


def batch1(options: Options) -> Iterator[Record]:
    """One row, short context: every token reads all weights once, so memory sets the limit."""
    yield from _requests(options, "batch1", batch=1, context=32, new_tokens=64)


def batch8(options: Options) -> Iterator[Record]:
    """Eight rows through the engine and through transformers.generate."""
    yield from _requests(options, "batch8", batch=8, context=options.size.engine_context, new_tokens=32)


def _requests(options: Options, case: str, *, batch: int, context: int, new_tokens: int) -> Iterator[Record]:
    size = options.size
    gpt, gpthf = size.gpt(), size.gpthf(size.splits[0])
    llama, tokenizer = as_llama(gpt), size.tokenizer()
    prompts = [_ids(gpt, context) for _ in range(batch)]
    weight_bytes = sum(parameter.nbytes for parameter in gpt.parameters())
    workload = {"batch": batch, "context": context, "new_tokens": new_tokens, "size": size.name}
    workload |= {"weight_bytes": weight_bytes}
    params = SamplingParams(max_new_tokens=new_tokens, ignore_end_of_text=True)
    name = _split_name(size.splits[0])
    runs: dict[str, Run] = {"memory": lambda: {"bytes_per_second": memory_read_rate()}} if batch == 1 else {}
    for peer, model in (("gpt", gpt), (name, gpthf)):
        engine = Engine(model, tokenizer, max_rows=batch)
        runs[peer] = lambda engine=engine: _engine_request(engine, prompts, params, is_compiled=False)
        if batch == 1:
            runs[f"{peer}, compiled"] = lambda engine=engine: _engine_request(engine, prompts, params, is_compiled=True)
    for cache in ("dynamic", "static"):
        runs[f"transformers Llama, {cache} cache"] = lambda cache=cache: _generate(llama, prompts, new_tokens, cache)
    settings = {peer: {"program": "Engine"} for peer in runs if peer.startswith("gpt")}
    with ExitStack() as stack:
        llama_cpp = _llama_cpp(stack, gpt, options, context + new_tokens + 8) if batch == 1 else None
        if llama_cpp is not None:
            peer_process = llama_cpp

            def ask() -> dict[str, float]:
                answer = peer_process.ask(ask="generate", ids=prompts[0], new_tokens=new_tokens)
                seconds = answer["decode_seconds"]
                return {
                    "first_token_seconds": answer["first_token_seconds"],
                    "tokens_per_second": (new_tokens - 1) / seconds,
                    "seconds": answer["first_token_seconds"] + seconds,
                }

            runs["llama.cpp"] = ask
        elif batch == 1:
            yield _missing_llama_cpp(case, workload)
        yield from _measured(
            case,
            workload,
            runs,
            settings,
            repeats=options.repeats,
            on_run=lambda name, number: options.on_progress(f"{batch} requests at once: {name}, round {number}"),
        )


def _engine_request(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, *, is_compiled: bool
) -> dict[str, float]:
    compile_steps(engine.model, enabled=is_compiled)
    done = engine.generate(prompts, params)
    compile_steps(engine.model, enabled=False)
    first = max(completion.first_token_seconds for completion in done)
    seconds = max(completion.seconds for completion in done)
    new = sum(completion.usage.new_tokens for completion in done)
    return {
        "first_token_seconds": first,
        "tokens_per_second": (new - len(done)) / (seconds - first),
        "seconds": seconds,
    }


class _Clock(StoppingCriteria):
    """Notes when transformers' generate has chosen each token; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.inference_mode()
def _generate(llama: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int, cache: str) -> dict[str, float]:
    ids, clock = torch.tensor(prompts), _Clock()
    started = time.perf_counter()
    output = llama.generate(  # type: ignore[attr-defined]  transformers hides its mixin from type checkers
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation=cache,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    seconds = time.perf_counter() - started
    assert isinstance(output, torch.Tensor)
    assert output.shape[1] == ids.shape[1] + new_tokens
    first, last = clock.times[0] - started, clock.times[-1] - started
    return {
        "first_token_seconds": first,
        "tokens_per_second": len(prompts) * (new_tokens - 1) / (last - first),
        "seconds": seconds,
    }


def packed(options: Options) -> Iterator[Record]:
    """32 prompts of very unequal length, read without padding, padded, and sorted into padded batches of 8."""
    size = options.size
    gpt = size.gpt()
    pack_weights(gpt)
    llama = as_llama(gpt)
    longest = size.longest_prompt
    lengths = [longest, *(8 + (7 * number) % (longest // 8 - 7) for number in range(31))]
    rows = [_ids(gpt, length) for length in lengths]
    by_length = sorted(rows, key=len)
    batches = [by_length[first : first + 8] for first in range(0, len(rows), 8)]
    workload = {"prompts": len(rows), "longest": max(lengths), "tokens": sum(lengths), "size": size.name}

    def padded(parts: list[list[list[int]]]) -> Run:
        tensors = [_left_padded(part) for part in parts]
        return lambda: {"seconds": seconds_of(lambda: [_llama_prefill(llama, *tensor) for tensor in tensors])}

    runs: dict[str, Run] = {
        "gpt, packed": _own_prefill(gpt, rows),
        "gpt, padded": _own_prefill(gpt, [_ids(gpt, longest)] * len(rows)),
        "transformers Llama, padded": padded([rows]),
        "transformers Llama, sorted in batches of 8": padded(batches),
    }
    yield from _measured(
        "packed",
        workload,
        runs,
        {},
        repeats=options.repeats,
        on_run=lambda name, number: options.on_progress(f"32 prompts: {name}, round {number}"),
    )


def _left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


#: What `bench speed` measures, by name.
CASES: dict[str, Callable[[Options], Iterator[Record]]] = {
    "prefill": prefill,
    "decode": decode,
    "batch1": batch1,
    "batch8": batch8,
    "packed": packed,
}

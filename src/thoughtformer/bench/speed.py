"""Speed: prefill, decoding and whole requests, ours beside peers with KV caches, on the same weights or shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

from thoughtformer.bench.architectures import architectures
from thoughtformer.bench.drafts import draft_model, drafts
from thoughtformer.bench.records import Record
from thoughtformer.bench.requests import batch1, batch8
from thoughtformer.bench.running import (
    Options,
    measured,
    next_ids,
    regular_text,
    split_name,
    start_llama_cpp,
    without_llama_cpp,
)
from thoughtformer.bench.sentinels import compressed
from thoughtformer.bench.serving import known, requests
from thoughtformer.bench.shapes import SENTENCE_TOKENS
from thoughtformer.bench.synthetic import filled_cache, filled_dynamic_cache
from thoughtformer.bench.timing import Run, seconds_of
from thoughtformer.convert.llama import as_llama
from thoughtformer.errors import UnsupportedError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.packed_linear import pack_weights
from thoughtformer.models.transformers_api import CACHE_NAME

__all__ = ["CASES"]

#: Contexts above this are for the project's own models: the others' prefill is the plain GPT's, over again.
LONGEST_PEER_CONTEXT = 4096
#: Of the memory that is free, what caches may take.
USABLE_MEMORY = 0.93


def prefill(options: Options) -> Iterator[Record]:
    """Time to read a prompt, up to the logits of its last token."""
    size = options.size
    contexts = options.contexts or size.contexts
    gpt = size.gpt()
    models = {split_name(split): size.gpthf(split) for split in size.splits} | {"gpt": gpt}
    for model in models.values():
        pack_weights(model)
    llama = as_llama(gpt)
    with ExitStack() as stack:
        shared = [context for context in contexts if context <= LONGEST_PEER_CONTEXT]
        llama_cpp = start_llama_cpp(stack, gpt, options, max(shared) + 8) if shared else None
        for model in models.values():
            _own_prefill(model, [regular_text(model, min(contexts))])()  # long contexts get no warm-up of their own
        for context in contexts:
            workload = {"batch": 1, "context": context, "size": size.name}
            runs: dict[str, Run] = {}
            for name, model in models.items():
                runs[name] = _own_prefill(model, [regular_text(model, context)])
            if context <= LONGEST_PEER_CONTEXT:
                ids = torch.tensor([regular_text(gpt, context)])
                runs["transformers Llama"] = lambda ids=ids: {"seconds": seconds_of(lambda: _llama_prefill(llama, ids))}
                if llama_cpp is not None:
                    peer, listed = llama_cpp, ids[0].tolist()
                    runs["llama.cpp"] = lambda peer=peer, listed=listed: {
                        "seconds": peer.ask(ask="generate", ids=listed, new_tokens=1)["first_token_seconds"]
                    }
                else:
                    yield without_llama_cpp("prefill", workload)
            repeats, warmups = options.rounds(context)
            yield from measured(
                "prefill",
                workload,
                runs,
                {} if llama_cpp is None else {"llama.cpp": llama_cpp.about},
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
    llama(ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **{CACHE_NAME: DynamicCache()})


def decode(options: Options) -> Iterator[Record]:
    """Tokens a second of a batch that holds long contexts: caches filled without reading, one model after the other."""
    size, batch = options.size, options.size.decode_batch
    new_tokens = SENTENCE_TOKENS
    gpt = size.gpt()
    name = split_name(size.splits[0])
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
        yield from measured(
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
    try:
        import psutil
    except ImportError:
        raise UnsupportedError('measuring needs psutil: pip install "thoughtformer[bench]".') from None
    return psutil.virtual_memory().available


@torch.inference_mode()
def _own_steps(model: GPTHFForCausalLM, batch: int, context: int, new_tokens: int) -> dict[str, float]:
    warmups = 3
    cache = filled_cache(model, num_rows=batch, context=context, reserve_tokens=context + warmups + new_tokens)
    rows = torch.arange(batch)

    def step(position: int) -> None:
        model.ragged_logits(next_ids(model, batch, position), rows, cache, num_columns=1)

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
    ids = next_ids(gpt, batch, 0)[:, None]

    def step() -> None:
        llama(ids, use_cache=True, **{CACHE_NAME: cache})

    step()
    seconds = seconds_of(lambda: [step() for _ in range(new_tokens)])
    layers: list[Any] = cache.layers
    num_bytes = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    return {"tokens_per_second": batch * new_tokens / seconds, "kv_bytes": float(num_bytes)}


def packed(options: Options) -> Iterator[Record]:
    """32 prompts of very unequal length, read without padding, padded, and sorted into padded batches of 8."""
    size = options.size
    gpt = size.gpt()
    pack_weights(gpt)
    llama = as_llama(gpt)
    longest = size.longest_prompt
    lengths = [longest, *(8 + (7 * number) % (longest // 8 - 7) for number in range(31))]
    rows = [regular_text(gpt, length) for length in lengths]
    by_length = sorted(rows, key=len)
    batches = [by_length[first : first + 8] for first in range(0, len(rows), 8)]

    def as_padded(batch: list[list[int]]) -> list[list[int]]:
        """Rows as long as the longest: what padding costs, for a model that reads no padding."""
        return [regular_text(gpt, max(len(row) for row in batch))] * len(batch)

    own_batches = [_own_prefill(gpt, as_padded(batch)) for batch in batches]
    workload = {"prompts": len(rows), "longest": max(lengths), "tokens": sum(lengths), "size": size.name}

    def padded(parts: list[list[list[int]]]) -> Run:
        tensors = [_left_padded(part) for part in parts]
        return lambda: {"seconds": seconds_of(lambda: [_llama_prefill(llama, *tensor) for tensor in tensors])}

    runs: dict[str, Run] = {
        "gpt, packed": _own_prefill(gpt, rows),
        "gpt, padded": _own_prefill(gpt, as_padded(rows)),
        "gpt, sorted in batches of 8": lambda: {"seconds": sum(run()["seconds"] for run in own_batches)},
        "transformers Llama, padded": padded([rows]),
        "transformers Llama, sorted in batches of 8": padded(batches),
    }
    yield from measured(
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
    "compressed": compressed,
    "architectures": architectures,
    "known": known,
    "requests": requests,
    "drafts": drafts,
    "draft_model": draft_model,
}

"""Sentinel compression of a plain model beside the same model uncompressed: prefill, decoding and bytes held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from thoughtformer.bench.records import Record
from thoughtformer.bench.running import Options, measured
from thoughtformer.bench.timing import Run, seconds_of
from thoughtformer.cache import distinct_storage_bytes
from thoughtformer.compression import AdapterConfig, RemovedFraction, Sentinel, SentinelAdapter, compress
from thoughtformer.compression.solving import span_for
from thoughtformer.models.backbone import backbone_of
from thoughtformer.models.loading import load
from thoughtformer.models.transformers_api import CACHE_NAME

__all__ = ["compressed"]

REMOVED = 0.9


def compressed(options: Options) -> Iterator[Record]:
    """90% of the entries folded away: the bundled pair near its trained length, and a random Llama at 4,096 tokens."""
    is_full = options.size.name == "full"
    yield from _case(options, "tiny-gpt", context=960 if is_full else 64, batch=16 if is_full else 2)
    yield from _case(options, "random Llama", context=4096 if is_full else 96, batch=16 if is_full else 2)


def _random_llama(context: int) -> LlamaForCausalLM:
    """A Llama of tiny-gpt's shape, for so many tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context + 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def _case(options: Options, name: str, *, context: int, batch: int) -> Iterator[Record]:
    new_tokens = 32 if options.size.name == "full" else 8
    policy = RemovedFraction(removed=REMOVED, span_tokens=span_for(REMOVED, 1, context))
    adapter: Any
    if name == "tiny-gpt":
        base: Any = load(name)[0]
        twin: Any = load(name)[0]
        adapter = "tiny-gpt-sentinel"
    else:
        base, twin = _random_llama(context), _random_llama(context)
        settings = AdapterConfig(lora_rank=32, lora_layers="all", sentinels_only=True)
        adapter = SentinelAdapter(backbone_of(twin), settings)
    ids = torch.randint(3, 8000, (batch, context), generator=torch.Generator().manual_seed(0))
    is_own = name == "tiny-gpt"
    with compress(twin, Sentinel(policy=policy), adapter=adapter) as folding:
        caches: dict[str, Callable[[], Any]] = {"uncompressed, own cache": lambda: base.new_cache(batch)}
        if not is_own:
            room = context + new_tokens
            caches = {
                "uncompressed, dynamic cache": DynamicCache,
                "uncompressed, static cache": lambda: StaticCache(config=base.config, max_cache_len=room),
            }
        runs: dict[str, Run] = {
            peer: lambda new_cache=new_cache: _request(base, new_cache, ids, new_tokens)
            for peer, new_cache in caches.items()
        }
        runs["sentinel"] = lambda: _request(folding, lambda: folding.new_cache(batch), ids, new_tokens)
        yield from measured(
            "compressed",
            {
                "model": name,
                "batch": batch,
                "context": context,
                "new_tokens": new_tokens,
                "removed": REMOVED,
                "size": options.size.name,
            },
            runs,
            {},
            repeats=options.repeats,
            on_run=lambda peer, number: options.on_progress(f"{name}, {context} tokens: {peer}, round {number}"),
        )


@torch.inference_mode()
def _request(model: Any, new_cache: Callable[[], Any], ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """One prefill and so many greedy steps."""
    cache = new_cache()
    logits: list[torch.Tensor] = []

    def prefill() -> None:
        logits.append(model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache}).logits)

    def decode() -> None:
        for _ in range(new_tokens):
            token = logits.pop()[:, -1:].argmax(dim=-1)
            logits.append(model(token, use_cache=True, **{CACHE_NAME: cache}).logits)

    prefill_seconds = seconds_of(prefill)
    kv_bytes = _bytes(cache)
    return {
        "prefill_seconds": prefill_seconds,
        "kv_bytes": float(kv_bytes),
        "tokens_per_second": new_tokens * len(ids) / seconds_of(decode),
    }


def _bytes(cache: Any) -> int:
    if hasattr(cache, "num_bytes"):
        return cache.num_bytes()
    return distinct_storage_bytes([tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])

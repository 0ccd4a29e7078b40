"""Memory and speed of sentinel compression beside the same model uncompressed, in the same run.

    python benchmarks/compression_speed.py                          # tiny-gpt with tiny-gpt-sentinel, 1,024 tokens
    python benchmarks/compression_speed.py --context 4096 --random  # random Llama and sentinels of the same shape

Random weights change no byte and no time. Prints a table, then one JSON line. Each figure is the median of interleaved
runs, with the range in brackets; the uncompressed model keeps its own KV cache (transformers' DynamicCache for Llama).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from thoughtformer.cache import distinct_storage_bytes
from thoughtformer.compression import AdapterConfig, RemovedFraction, Sentinel, SentinelAdapter, compress
from thoughtformer.evaluate.compression import span_for
from thoughtformer.models.backbone import backbone_of
from thoughtformer.models.loading import load_causal_lm


def random_llama(context: int) -> LlamaForCausalLM:
    """A Llama of tiny-gpt's shape, for so many tokens."""
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
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """The keys and values of transformers' cache."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.inference_mode()
def timed(model: Any, new_cache: Any, num_bytes: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """One prefill and so many greedy steps."""
    cache = new_cache()
    started = time.perf_counter()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    prefill = time.perf_counter() - started
    after_prefill = num_bytes(cache)
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = logits[:, -1:].argmax(dim=-1)
        logits = model(token, past_key_values=cache, use_cache=True).logits
    decode = time.perf_counter() - started
    return {
        "prefill_seconds": prefill,
        "tokens_per_second": new_tokens * len(ids) / decode,
        "kv_bytes": after_prefill,
    }


def main() -> None:
    """Runs both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=960, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--removed", type=float, default=0.9)
    parser.add_argument("--span-tokens", type=int, default=None)
    parser.add_argument("--random", action="store_true", help="random Llama instead of tiny-gpt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    span = (
        arguments.span_tokens
        if arguments.span_tokens is not None
        else span_for(arguments.removed, 1, arguments.context)
    )
    policy = RemovedFraction(removed=arguments.removed, span_tokens=span)
    adapter: Any
    if arguments.random:
        base: Any = random_llama(arguments.context)
        twin: Any = random_llama(arguments.context)
        adapter = SentinelAdapter(
            backbone_of(twin), AdapterConfig(lora_rank=32, lora_layers="all", sentinels_only=True)
        )
    else:
        base, _ = load_causal_lm("tiny-gpt")
        twin, _ = load_causal_lm("tiny-gpt")
        adapter = "tiny-gpt-sentinel"
    ids = torch.randint(3, 8000, (arguments.batch, arguments.context), generator=torch.Generator().manual_seed(0))

    def own_cache() -> Any:
        return DynamicCache(config=base.config) if arguments.random else base.new_cache(arguments.batch)

    def own_bytes(cache: Any) -> int:
        return distinct_storage_bytes(cache_tensors(cache)) if arguments.random else cache.num_bytes()

    results: dict[str, list[dict[str, float]]] = {"uncompressed": [], "compressed": []}
    with compress(twin, Sentinel(policy=policy), adapter=adapter) as compressed:
        for _ in range(arguments.repeats):
            results["uncompressed"].append(timed(base, own_cache, own_bytes, ids, arguments.new_tokens))
            results["compressed"].append(
                timed(
                    compressed,
                    lambda: compressed.new_cache(arguments.batch),
                    lambda cache: cache.num_bytes(),
                    ids,
                    arguments.new_tokens,
                )
            )
    table = Table(title=f"batch {arguments.batch}, {arguments.context} tokens, {arguments.removed:.0%} removed")
    for heading in ("", "uncompressed", "compressed", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    summary: dict[str, Any] = {}
    for name in ("prefill_seconds", "tokens_per_second", "kv_bytes"):
        medians = {kind: statistics.median(run[name] for run in runs) for kind, runs in results.items()}
        ranges = {
            kind: (min(run[name] for run in runs), max(run[name] for run in runs)) for kind, runs in results.items()
        }
        summary[name] = {kind: {"median": medians[kind], "range": ranges[kind]} for kind in medians}
        digits = 0 if name == "kv_bytes" else 2
        table.add_row(
            name,
            *(
                f"{medians[kind]:,.{digits}f} [{ranges[kind][0]:,.{digits}f}, {ranges[kind][1]:,.{digits}f}]"
                for kind in medians
            ),
            f"{medians['compressed'] / medians['uncompressed']:.3f}",
        )
    Console().print(table)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"arguments": vars(arguments), "span_tokens": span, "versions": versions, **summary}))


if __name__ == "__main__":
    main()

"""Caches as a long text would leave them, without reading it: what decoding costs doesn't depend on the values held."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from thoughtformer.bench.flops import regular_ids
from thoughtformer.bench.shapes import SENTENCE_TOKENS
from thoughtformer.cache import GPTHFCache
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.rules import read_structure, summaries_of, with_summaries

__all__ = ["filled_cache", "filled_dynamic_cache"]


@torch.inference_mode()
def filled_cache(model: GPTHFForCausalLM, *, num_rows: int, context: int, reserve_tokens: int = 0) -> GPTHFCache:
    """The cache of rows that read `context` tokens in sentences of 25, with random keys and values."""
    cache = model.new_cache(num_rows)
    cache.reserve(max(reserve_tokens, context))
    end = model.config.sentence_end_token_id
    ids = torch.tensor(regular_ids(context, sentence_tokens=SENTENCE_TOKENS, sentence_end_token_id=end) * num_rows)
    tokens = read_structure(
        ids,
        torch.arange(num_rows).repeat_interleave(context),
        cache.counters,
        sentence_end_token_id=end,
        document_start_token_id=model.config.bos_token_id,
    )
    after = cache.counters.after(tokens)
    for stage in cache.stages:
        # Body and memory of an hourglass hold summaries alone; an encoder repeats sentence ends that have several.
        if stage.per_token == 0:
            entries = summaries_of(tokens, stage.per_end)[1]
        else:
            entries = with_summaries(tokens, stage.per_end)[1] if stage.per_end > 1 else tokens
        stage.extend(entries[stage.rule.keeps(entries, after)])
        for tensor in (*stage.keys, *stage.values):
            _fill(tensor)
    cache.record(tokens, after, context)
    return cache


def filled_dynamic_cache(model: GPTHFForCausalLM, *, num_rows: int, context: int) -> DynamicCache:
    """transformers' cache for a Llama of the plain GPT's shape, holding `context` random entries a row."""
    config = model.config
    assert config.num_key_value_heads is not None
    cache = DynamicCache()
    for layer in range(config.num_body_layers):
        keys, values = (
            torch.empty(num_rows, config.num_key_value_heads, context, config.head_dim, dtype=model.dtype)
            for _ in range(2)
        )
        cache.update(_fill(keys), _fill(values), layer)
    return cache


def _fill(tensor: torch.Tensor) -> torch.Tensor:
    """Random values, one row's repeated for all: drawing them all anew would take minutes."""
    tensor[:1].normal_()
    tensor[1:] = tensor[:1]
    return tensor

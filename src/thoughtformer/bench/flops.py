"""FLOPs by torch's counter, with its gap on CPUs closed.

torch counts 0 for the CPU's flash attention kernel, and for products on packed weights; their formulas are registered
here for the counter alone. A multiply and an add are two. Only products count: norms, rotations and softmax, a few per
cent of a small model, do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.packed_linear import can_pack

__all__ = ["CountedFlops", "count_flops", "generation_flops", "regular_ids"]


@dataclass
class CountedFlops:
    """Filled when the counting block ends."""

    total: int = 0


# The counter has replaced tensors by their shapes.


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _causal_attention_flops(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any
) -> int:
    """A causal kernel leaves out what lies past each query: of n squared scores it needs (n + 1) n / 2."""
    whole = sdpa_flop_count(query, key, value)
    return whole * (key[-2] + 1) // (2 * key[-2]) if is_causal else whole


def _packed_linear_flops(states: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(states) * weight[0]


@contextmanager
def count_flops(*, causal_as_whole: bool = True) -> Iterator[CountedFlops]:
    """Counts the FLOPs of products inside the block.

    torch's own counter takes causal attention for the whole square; without `causal_as_whole` it is what is needed.
    """
    attention = _cpu_attention_flops if causal_as_whole else _causal_attention_flops
    formula: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    if can_pack():
        formula[torch.ops.mkldnn._linear_pointwise] = _packed_linear_flops
    counted = CountedFlops()
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        yield counted
    counted.total = counter.get_total_flops()


@torch.inference_mode()
def generation_flops(model: GPTHFForCausalLM, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> int:
    """FLOPs to read one row's prompt and write its new tokens, incrementally; the last is chosen, but not read."""
    cache = model.new_cache(1)
    prompt = torch.tensor([list(prompt_ids)], device=model.device)
    with count_flops() as counted:
        model(prompt, cache=cache, logits_to_keep=1)
        for token in new_ids[:-1]:
            model(torch.tensor([[token]], device=model.device), cache=cache)
    return counted.total


def regular_ids(num_tokens: int, *, sentence_tokens: int, sentence_end_token_id: int | None) -> list[int]:
    """Ids of a text of equally long sentences, ends included: for counting and timing, where their value is nothing."""
    ids = [3 if sentence_end_token_id is None else sentence_end_token_id + 2] * num_tokens
    if sentence_end_token_id is not None:
        ids[sentence_tokens - 1 :: sentence_tokens] = [sentence_end_token_id] * (num_tokens // sentence_tokens)
    return ids

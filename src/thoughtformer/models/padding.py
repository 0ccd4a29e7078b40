"""Padded batches: which columns are tokens, and which logits are wanted."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.errors import InputError, UnsupportedError

__all__ = ["check_positions", "kept_columns", "real_tokens"]


def real_tokens(input_ids: Int[Tensor, "batch seq"], attention_mask: Tensor | None) -> Bool[Tensor, "batch seq"]:
    """Which of the new columns are tokens, on the CPU; the mask may be over all columns seen."""
    batch, seq = input_ids.shape
    if attention_mask is None:
        return torch.ones(batch, seq, dtype=torch.bool)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < seq:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; needed is (batch, columns) with batch={batch} "
            f"and at least {seq} columns, 1 for tokens and 0 for padding. Who sees whom is not for the mask to say."
        )
    return attention_mask[:, attention_mask.shape[1] - seq :].bool().cpu()


def check_positions(
    position_ids: Tensor | None, real: Bool[Tensor, "batch seq"], before: Int[Tensor, " batch"]
) -> None:
    """Raises `UnsupportedError` unless positions number each row's tokens in order, from what was read `before`."""
    if position_ids is None:
        return
    expected = before[:, None] + real.cumsum(dim=1) - 1
    given = position_ids.cpu().expand_as(expected)
    if not bool((given == expected)[real].all()):
        raise UnsupportedError(
            "position_ids must number each row's tokens in order from what its cache has read; a compressed model "
            "counts them itself."
        )


def kept_columns(logits_to_keep: int | Tensor, seq: int) -> Int[Tensor, " kept"]:
    """The columns that `logits_to_keep` names: the last so many (0: all), or these."""
    if isinstance(logits_to_keep, Tensor):
        return torch.arange(seq)[logits_to_keep.cpu()]
    return torch.arange(seq)[-logits_to_keep if logits_to_keep else 0 :]

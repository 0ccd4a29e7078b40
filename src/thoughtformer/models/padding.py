"""Padded batches: which columns are tokens, and which logits are wanted."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.errors import InputError

__all__ = ["kept_columns", "real_tokens"]


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


def kept_columns(logits_to_keep: int | Tensor, seq: int) -> Int[Tensor, " kept"]:
    """The columns that `logits_to_keep` names: the last so many (0: all), or these."""
    if isinstance(logits_to_keep, Tensor):
        return torch.arange(seq)[logits_to_keep.cpu()]
    return torch.arange(seq)[-logits_to_keep if logits_to_keep else 0 :]

"""Padded batches: which columns are tokens, and which logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.errors import InputError, UnsupportedError

__all__ = ["KeptColumns", "check_ids", "check_positions", "real_tokens"]


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


def check_ids(ids: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises `InputError` for a row with an id outside the vocabulary."""
    for number, row in enumerate(ids):
        if row and (max(row) >= vocab_size or min(row) < 0):
            wrong = next(token for token in row if not 0 <= token < vocab_size)
            raise InputError(f"row {number} has the id {wrong}, but the vocabulary has {vocab_size} ids.")


class KeptColumns:
    """The columns of logits that `logits_to_keep` names: the last so many (0: all), or these, in any order.

    Each is computed once, from left to right, whichever way it is asked for.
    """

    def __init__(self, logits_to_keep: int | Tensor, seq: int) -> None:
        columns = torch.arange(seq)
        if isinstance(logits_to_keep, Tensor):
            self._asked = columns[logits_to_keep.cpu()]
        else:
            self._asked = columns[-logits_to_keep if logits_to_keep else 0 :]
        self._computed = self._asked.unique()
        self.is_all = torch.equal(self._asked, columns)

    def wanted(self, real: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """The tokens whose logits are needed."""
        return torch.zeros_like(real).index_fill(1, self._computed, True) & real

    def laid_out(
        self, logits: Float[Tensor, "wanted vocab"], real: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch kept vocab"]:
        """The wanted tokens' logits, row by row, as the columns that were asked for; 0 in padding."""
        is_real = real[:, self._computed]
        if bool(is_real.all()):
            columns = logits.view(*is_real.shape, logits.shape[-1])
        else:
            columns = logits.new_zeros(*is_real.shape, logits.shape[-1])
            columns[is_real.to(logits.device)] = logits
        if torch.equal(self._asked, self._computed):
            return columns
        return columns[:, torch.searchsorted(self._computed, self._asked).to(logits.device)]

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

    A padded column has the logits of its row's last token before it, so that `generate` goes on rightly from rows that
    are padded at the right; 0 where there is none. Each token is computed once, whichever way it is asked for.
    """

    def __init__(self, logits_to_keep: int | Tensor, real: Bool[Tensor, "batch seq"]) -> None:
        columns = torch.arange(real.shape[1])
        if isinstance(logits_to_keep, Tensor):
            asked = columns[logits_to_keep.cpu()]
        else:
            asked = columns[-logits_to_keep if logits_to_keep else 0 :]
        self.is_all = torch.equal(asked, columns)
        # For each row and column asked for, the column of its token; -1 for none.
        source = asked.expand(len(real), -1)
        if not bool(real.all()):
            source = torch.where(real, columns, -1).cummax(dim=1).values[:, asked]
        self._has_token = source >= 0
        self._token = (self._has_token.nonzero()[:, 0], source[self._has_token])
        #: The tokens whose logits are needed.
        self.wanted: Bool[Tensor, "batch seq"] = torch.zeros_like(real)
        self.wanted[self._token] = True

    def laid_out(self, logits: Float[Tensor, "wanted vocab"]) -> Float[Tensor, "batch kept vocab"]:
        """The wanted tokens' logits, row by row, as the columns that were asked for."""
        shape = (*self._has_token.shape, logits.shape[-1])
        index = (self.wanted.reshape(-1).cumsum(0) - 1).view(self.wanted.shape)[self._token]
        if bool(self._has_token.all()) and torch.equal(index, torch.arange(len(logits))):
            return logits.view(shape)
        columns = logits.new_zeros(shape)
        columns[self._has_token.to(logits.device)] = logits[index.to(logits.device)]
        return columns

"""What this package's caches share: rows that transformers may reorder, and a length apart from what is held."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache

from thoughtformer.errors import InputError, UnsupportedError

__all__ = ["RowsCache", "check_accepted", "distinct_storage_bytes"]


RowsCacheKind = TypeVar("RowsCacheKind", bound="RowsCache")


def distinct_storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once: a view keeps all of its storage alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def check_accepted(num_tokens: Int[Tensor, " rows"], pending: Int[Tensor, " rows"]) -> None:
    """Raises `InputError` unless each row has as many uncommitted tokens as are to be committed."""
    if num_tokens.shape != pending.shape or bool(((num_tokens > pending) | (num_tokens < 0)).any()):
        raise InputError(
            f"commit(num_tokens={num_tokens.tolist()}), but {pending.tolist()} tokens are uncommitted in the rows."
        )


class RowsCache(Cache):
    """The generation state of some rows, of which entries are dropped for good.

    `get_seq_length` is the logical length, columns given to the model with padding, as transformers expects.

    A forward pass commits what it wrote, unless `autocommit` is off: then passes pile up, masked instead of dropped,
    until `commit` (of all, or of each row's first few tokens) or `rollback`. While some are uncommitted, rows can't be
    selected, joined, saved, or forked by row.

    transformers derives what a cache is from its list of layers. Here that list is empty, since entries aren't kept by
    layer as transformers does, so that everything it asks a cache is answered here or refused: tests/contract compares
    with `Cache` as it is today.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.num_columns = 0
        self._autocommit = True

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows held."""

    @abstractmethod
    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in that order; a row may be named more than once."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all distinct storages held."""

    @abstractmethod
    def join(self, other: Any) -> None:
        """Adds the rows of another cache of the same model behind these; the other is used up by that."""

    @abstractmethod
    def fork_rows(self: RowsCacheKind, rows: Int[Tensor, " selected"]) -> RowsCacheKind:
        """A cache of the given rows, in storage of their own."""

    @abstractmethod
    def saved(self) -> dict[str, Tensor]:
        """Everything held, by name; for `restore_saved`."""

    @abstractmethod
    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave, of a cache of the same model and as many rows.

        Raises:
            KeyError, ValueError: something is missing, or of another shape.
        """

    @property
    def autocommit(self) -> bool:
        """Whether a pass commits what it wrote.

        Raises:
            UnsupportedError: turned off, where no token can be taken back.
        """
        return self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        if not value and not self.can_speculate:
            raise UnsupportedError(
                f"{self.written_by} overwrites what it drops, at each token, so that none can be taken back: leave "
                "autocommit on."
            )
        self._autocommit = value

    @property
    def can_speculate(self) -> bool:
        """Whether `autocommit` can be turned off."""
        return True

    @property
    def written_by(self) -> str:
        """What decides who may read it, for errors."""
        return type(self).__name__

    @abstractmethod
    def commit(self, num_tokens: Int[Tensor, " rows"] | None = None) -> None:
        """Makes uncommitted tokens final: all of them, or each row's first `num_tokens`, forgetting the rest.

        What `get_seq_length` says goes back to the row that keeps most.

        Raises:
            InputError: more tokens than are uncommitted.
        """

    @abstractmethod
    def rollback(self) -> None:
        """Returns to the last commit."""

    def reserve(self, num_tokens: int) -> None:
        """Makes room for rows of so many tokens, where every token is held."""

    @property
    def batch_size(self) -> int:  # transformers' name for it
        return self.num_rows

    @property
    def is_compileable(self) -> bool:
        """False: what is held changes shape."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: what was dropped is gone, so no number of tokens can be taken back."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True: there is nothing to allot before the first pass."""
        return True

    def __len__(self) -> int:
        """1, as if it were of one layer: a cache that holds something must not be false."""
        return 1

    # By layer: none has a window, a recurrent state, or nothing.

    @property
    def is_sliding(self) -> list[bool]:
        """No layer is."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """No layer is; `generate` would read a whole text again if all seemed so."""
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        """No layer is."""
        return [False]

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """False: what was dropped is gone."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included, whatever is still held."""
        return self.num_columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The column of the next query."""
        return self.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask for new queries, and the first of them."""
        return self.num_columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was dropped can't come back."""
        raise UnsupportedError(
            f"crop({tokens_to_remove}) on a {type(self).__name__}: what was dropped or folded is gone. fork() it "
            "before instead, or turn autocommit off and use rollback() or commit(num_tokens)."
        )

    def _check_committed(self, what: str, *, is_committed: bool) -> None:
        if not is_committed:
            raise UnsupportedError(f"{what} needs a committed cache: call commit() or rollback() first.")

    def _refused(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a `RowsCache` is read and written by its own kind of model alone."""
        raise UnsupportedError(
            f"this {type(self).__name__} belongs to a compressed model or a GPTHF: give it to that model's generate or "
            "forward, not to the model underneath or another, which would read dropped tokens."
        )

    update = update_indexer = early_initialization = prefetch = offload = activate_past_recording = _refused
    update_conv_state = update_recurrent_state = get_conv_state = get_recurrent_state = has_previous_state = _refused

    def fork(self: RowsCacheKind) -> RowsCacheKind:
        """A copy that shares no storage with this one."""
        return copy.deepcopy(self)

    # transformers' names for selecting rows, called by beam search and contrastive search.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues from what row `beam_idx[i]` held."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, copies side by side."""
        self.select(torch.arange(self.num_rows).repeat_interleave(repeats))

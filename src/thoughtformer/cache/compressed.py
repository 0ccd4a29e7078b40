"""What a compressed model holds between steps: a `transformers` cache from which dropped entries are really gone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache

from thoughtformer.attention.entries import OPEN, Entries
from thoughtformer.attention.schedule import Chunk, RowProgress
from thoughtformer.cache.gpthf import distinct_storage_bytes
from thoughtformer.cache.slots import RowSlots
from thoughtformer.errors import UnsupportedError

__all__ = ["BLOCK_ENTRIES", "ENTRY_FIELDS", "CompressedCache", "EntrySlots", "Store"]

#: What is known of an entry beside its keys and values; its span is known while it is being folded alone.
ENTRY_FIELDS = ("position", "order", "since", "until")
#: Entries are allotted in blocks of so many.
BLOCK_ENTRIES = 32


class Store(Protocol):
    """Where keys and values are held."""

    lengths: Int[Tensor, " rows"]

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        ...

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows."""
        ...

    def clear(self) -> None:
        """Forgets everything; the rows stay."""
        ...


class EntrySlots(RowSlots):
    """Slots of entries that all layers and heads hold alike."""

    def held(self, chunk: Chunk) -> Entries:
        """The entries of each row's first `longest` slots, with what `chunk`'s events change of them."""
        longest = self.longest
        if chunk.until is not None and chunk.span is not None:
            position = self.field("position")[:, :longest].long().clamp(max=chunk.until.shape[1] - 1)
            is_token = (self.field("order")[:, :longest] < OPEN) & (torch.arange(longest) < self.lengths[:, None])
            until = self.field("until")[:, :longest]
            until.copy_(torch.where(is_token, torch.minimum(chunk.until.gather(1, position), until), until))
            span = torch.where(is_token, chunk.span.gather(1, position), -1)
        else:
            span = torch.full((len(self.lengths), longest), -1, dtype=torch.int32)
        position, order, since, until = self.entries[: len(ENTRY_FIELDS), :, :longest]
        return Entries(position=position, order=order, span=span, since=since, until=until)

    def is_held(self) -> Bool[Tensor, "rows longest"]:
        """Which of the first `longest` slots hold an entry."""
        return torch.arange(self.longest) < self.lengths[:, None]

    def drop_unreadable(self, next_position: Int[Tensor, " rows"]) -> None:
        """Drops what no token from `next_position` on may read."""
        longest = self.longest
        self.keep(
            (self.field("until")[:, :longest] >= next_position[:, None]) & (self.field("order")[:, :longest] != OPEN)
        )

    def clear(self) -> None:
        """Forgets everything; the rows stay."""
        self.lengths = torch.zeros_like(self.lengths)
        self.fit()


class CompressedCache(Cache):
    """The generation state of some rows of a compressed model.

    `get_seq_length` is the logical length, columns given to the model with padding; what is still held is in
    `num_entries`. Keys keep the rotation of their own position wherever they are stored.
    """

    def __init__(self, store: Store, rows: list[RowProgress], identity: dict[str, Any]) -> None:
        super().__init__(layers=[])
        self.store = store
        self.rows = rows
        self.num_columns = 0
        #: Which model, adapter and method wrote it: it can be read by no other.
        self.identity = identity

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self.rows)

    @property
    def batch_size(self) -> int:  # transformers' name for it
        return self.num_rows

    @property
    def num_tokens(self) -> Int[Tensor, " rows"]:
        """Tokens that each row has read."""
        return torch.tensor([row.num_tokens for row in self.rows])

    @property
    def num_entries(self) -> Int[Tensor, " rows"]:
        """Entries that each row still holds."""
        return self.store.lengths

    @property
    def is_fresh(self) -> bool:
        """Nothing has been read yet."""
        return not any(row.num_tokens for row in self.rows)

    @property
    def is_compileable(self) -> bool:
        """False: what is held changes shape."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: what was dropped is gone, so no number of tokens can be taken back."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: the logical length, whatever is still held."""
        return self.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Entries held by the longest row with the new ones, and how many columns fewer that is than were seen."""
        physical = int(self.num_entries.max()) if self.num_rows else 0
        return physical + query_length, self.num_columns - physical

    def num_bytes(self) -> int:
        """Bytes of all distinct storages held, keys, values and bookkeeping, unused parts of blocks included."""
        return distinct_storage_bytes(self.store.tensors())

    def live_bytes(self, bytes_per_entry: int) -> int:
        """Bytes of keys and values that some later token can read."""
        return int(self.num_entries.sum()) * bytes_per_entry

    def fork(self) -> CompressedCache:
        """A copy that shares no storage with this one."""
        return copy.deepcopy(self)

    def select(self, rows: Int[Tensor, " selected"] | Sequence[int]) -> None:
        """Keeps the given rows, in that order; a row may be named more than once."""
        rows = torch.as_tensor(rows).to(device="cpu", dtype=torch.long)
        self.store.select(rows)
        self.rows = [self.rows[row].copy() for row in rows.tolist()]

    # transformers' names for the same, called by beam search and contrastive search.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues from what row `beam_idx[i]` held."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, copies side by side."""
        self.select(torch.arange(self.num_rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything; the rows stay."""
        self.rows = [RowProgress() for _ in self.rows]
        self.num_columns = 0
        self.store.clear()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: only the compressed model knows what to keep."""
        raise UnsupportedError(
            "this cache belongs to a compressed model: give it to compressed.generate or compressed(...), not to the "
            "model underneath, which would read dropped tokens."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was dropped can't come back."""
        raise UnsupportedError(
            f"crop({tokens_to_remove}) on a CompressedCache: dropped tokens are gone. fork() it before instead."
        )

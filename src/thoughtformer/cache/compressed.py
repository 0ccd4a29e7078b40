"""What a compressed model holds between steps: a `transformers` cache from which dropped entries are really gone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.attention.entries import OPEN, Entries
from thoughtformer.attention.schedule import Chunk, RowProgress
from thoughtformer.cache.rows import RowsCache, distinct_storage_bytes
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

    def saved(self) -> dict[str, Tensor]:
        """What is held, by name."""
        ...

    def restore_saved(self, held: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave; raises `KeyError` and `ValueError`."""
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


class CompressedCache(RowsCache):
    """The generation state of some rows of a compressed model.

    What is still held is in `num_entries`. Keys keep the rotation of their own position wherever they are stored.
    """

    def __init__(self, store: Store, rows: list[RowProgress], identity: dict[str, Any]) -> None:
        super().__init__()
        self.store = store
        self.rows = rows
        #: Which model, adapter and method wrote it: it can be read by no other.
        self.identity = identity

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self.rows)

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

    def select(self, rows: Int[Tensor, " selected"] | Sequence[int]) -> None:
        """Keeps the given rows, in that order; a row may be named more than once."""
        rows = torch.as_tensor(rows).to(device="cpu", dtype=torch.long)
        self.store.select(rows)
        self.rows = [self.rows[row].copy() for row in rows.tolist()]

    def join(self, other: CompressedCache) -> None:
        """Adds another cache's rows behind these; it is used up by that.

        Raises:
            UnsupportedError: a store whose rows can't be joined, or another model's.
        """
        if self.identity != other.identity:
            raise UnsupportedError("caches that different models, adapters or methods wrote can't be joined.")
        if not isinstance(self.store, EntrySlots) or not isinstance(other.store, EntrySlots):
            raise UnsupportedError("rows of heavy hitters can't be joined: each head holds entries of its own.")
        self.store.join(other.store)
        self.rows += other.rows
        self.num_columns = max(self.num_columns, other.num_columns)

    def fork_rows(self, rows: Int[Tensor, " selected"]) -> CompressedCache:
        """A cache of the given rows, in storage of their own."""
        copied = copy.copy(self)
        if isinstance(self.store, EntrySlots):
            copied.store = copy.copy(self.store)  # its `select` makes new tensors of all
        else:
            copied.store = copy.deepcopy(self.store)
        copied.select(rows)
        return copied

    def saved(self) -> dict[str, Tensor]:
        """Everything held, by name, and how far each row is."""
        held = self.store.saved()
        for number, row in enumerate(self.rows):
            held[f"progress.{number}"] = torch.tensor([row.num_tokens, row.num_held, row.next_start])
            held[f"notes.{number}"] = torch.tensor(row.notes, dtype=torch.float64)
        return held | {"num_columns": torch.tensor(self.num_columns)}

    def restore_saved(self, held: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave, of a cache of the same model and as many rows.

        Raises:
            KeyError, ValueError: something is missing, or of another shape.
        """
        rows = []
        for number in range(self.num_rows):
            num_tokens, num_held, next_start = held[f"progress.{number}"].tolist()
            notes: list[float] = [int(note) if note.is_integer() else note for note in held[f"notes.{number}"].tolist()]
            rows.append(RowProgress(num_tokens, num_held, next_start, notes))
        num_columns = int(held["num_columns"])
        self.store.restore_saved(held)
        self.rows, self.num_columns = rows, num_columns

    def snapshot(self, *, whole: bool) -> Any:
        """What `restore` needs to undo a forward pass, or, if `whole`, several.

        One pass needs lengths and fields alone: keys and values behind the lengths don't matter. A full heavy-hitter
        store overwrites what it drops, and copying it at every step would double what it costs: it is not kept.
        """
        if whole:
            return copy.deepcopy(self.store)
        return (self.store.lengths, self.store.entries.clone()) if isinstance(self.store, EntrySlots) else None

    def restore(self, snapshot: Any) -> None:
        """Undoes a pass that failed; a store of which nothing was kept is emptied."""
        if snapshot is None:
            self.reset()
        elif isinstance(snapshot, tuple):
            assert isinstance(self.store, EntrySlots)
            self.store.lengths, entries = snapshot
            self.store.entries[:, :, : entries.shape[2]] = entries
            self.store.fit()
        else:
            self.store = snapshot

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

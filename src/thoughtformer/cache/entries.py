"""What a compressed model holds between steps: a `transformers` cache from which dropped entries are really gone."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.cache.rows import RowsCache, check_accepted, distinct_storage_bytes
from thoughtformer.cache.slots import RowSlots
from thoughtformer.errors import UnsupportedError
from thoughtformer.rules.entries import FOREVER, OPEN, PADDING, TOKEN, Entries
from thoughtformer.rules.schedule import Chunk, RowProgress, RowReading

__all__ = ["BLOCK_ENTRIES", "ENTRY_FIELDS", "CompressedCache", "EntrySlots", "Store"]

#: What is known of an entry beside its keys and values; its span is known while it is being folded alone.
ENTRY_FIELDS = ("position", "order", "since", "until")
#: Entries are allotted in blocks of so many.
BLOCK_ENTRIES = 32


class Store(ABC):
    """Where a compressed model's keys and values are."""

    lengths: Int[Tensor, " rows"]
    #: What is dropped can wait for a commit.
    can_wait: bool = False
    #: It does now: entries that nothing may read any more are masked.
    waits: bool = False

    def wait(self, waits: bool) -> None:
        """Has what is dropped wait from now on, or not."""
        self.waits = waits

    def lengths_by_part(self) -> list[Int[Tensor, " rows"]]:
        """Entries of each row, in each part of the store that is sized by itself."""
        return [self.lengths]

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Everything held."""

    @abstractmethod
    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows."""

    @abstractmethod
    def fork_rows(self, rows: Int[Tensor, " selected"]) -> Store:
        """A store of the given rows, in storage of its own."""

    @abstractmethod
    def join(self, other: Any) -> None:
        """Adds the rows of another store of its kind behind these; raises `UnsupportedError` where that can't be."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets everything; the rows stay."""

    @abstractmethod
    def saved(self) -> dict[str, Tensor]:
        """What is held, by name."""

    @abstractmethod
    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave; raises `KeyError` and `ValueError`."""

    @abstractmethod
    def snapshot(self, *, whole: bool) -> Any:
        """What `restored` needs to undo a forward pass, or, if `whole`, several; None where that is to forget all."""

    @abstractmethod
    def restored(self, snapshot: Any) -> Store:
        """The store as it was when `snapshot` was taken."""

    def counts(self, row: int) -> tuple[int, int]:
        """Folded spans of a row, and tokens that are held as they are."""
        return 0, int(self.lengths[row])

    def mark(self) -> Any:
        """What `back_to` and `commit_first` need to know of now; of stores that can wait."""
        raise NotImplementedError

    def back_to(self, mark: Any) -> None:
        """Forgets what was written since the mark."""
        raise NotImplementedError

    def commit(self, next_position: Int[Tensor, " rows"]) -> None:
        """Ends waiting for all that was written: as if each pass had dropped what it made unreadable."""
        raise NotImplementedError

    def commit_first(self, mark: Any, readings: Sequence[RowReading]) -> None:
        """Of what was written since the mark, keeps what came of these first tokens, and drops what they drop."""
        raise NotImplementedError

    @abstractmethod
    def check_positions(self, row: int, num_tokens: int) -> None:
        """Raises `ValueError` if a row's entries are of positions that its text doesn't have."""


class EntrySlots(RowSlots, Store):
    """Slots of entries that all layers and heads hold alike.

    While it waits, nothing is moved: what was written since the last commit lies behind the entries of then.
    """

    can_wait = True
    #: Entries are held that no new token may read.
    has_unreadable = False
    #: How many of the last tokens a token reads, itself included; None: all that isn't dropped.
    window: int | None = None

    def entries_for(self, chunk: Chunk) -> Entries:
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

    def is_cached(self) -> Bool[Tensor, "rows longest"]:
        """Which of the first `longest` slots hold an entry."""
        return torch.arange(self.longest) < self.lengths[:, None]

    def seen(self, entries: Entries) -> Entries:
        """Entries as the layers of these slots see them."""
        return entries

    def is_kept(self, entries: Entries, next_position: Int[Tensor, "rows 1"]) -> Bool[Tensor, "rows entries"]:
        """Which entries a token from `next_position` on may still read, or a sentinel that comes."""
        return (entries.until >= next_position) & (entries.order != OPEN) & (entries.order != PADDING)

    def _stored(self, until: Int[Tensor, "rows longest"]) -> Entries:
        """The entries of each row's first `longest` slots, readable until then; of no span."""
        position, order, since, _ = self.entries[: len(ENTRY_FIELDS), :, : self.longest]
        return Entries(position=position, order=order, span=torch.full_like(order, -1), since=since, until=until)

    def drop_unreadable(self, next_position: Int[Tensor, " rows"]) -> None:
        """Drops what no token from `next_position` on may read."""
        stored = self._stored(self.field("until")[:, : self.longest])
        self.keep(self.is_kept(stored, next_position[:, None]))
        self.has_unreadable = False

    def finish(self, next_position: Int[Tensor, " rows"] | None) -> None:
        """Ends a pass: drops what can't be read from `next_position` on, or notes it; None: no event changed that."""
        if self.waits:
            self.has_unreadable |= next_position is not None
        elif next_position is not None:
            self.drop_unreadable(next_position)
        else:
            self.fit()

    def commit(self, next_position: Int[Tensor, " rows"]) -> None:
        """Ends waiting for all that was written: as if each pass had dropped what it made unreadable."""
        if self.has_unreadable:
            self.drop_unreadable(next_position)
        else:
            self.fit()

    def mark(self) -> tuple[Int[Tensor, " rows"], Int[Tensor, "rows slots"]]:
        """What `back_to` needs: how much is held, and until when it may be read."""
        return self.lengths, self.field("until").clone()

    def back_to(self, mark: tuple[Int[Tensor, " rows"], Int[Tensor, "rows slots"]]) -> None:
        """Forgets what was written since the mark."""
        self.lengths, until = mark
        self.field("until")[:, : until.shape[1]] = until
        self.has_unreadable = False
        self.fit()

    def commit_first(
        self,
        mark: tuple[Int[Tensor, " rows"], Int[Tensor, "rows slots"]],
        readings: Sequence[RowReading],
    ) -> None:
        """Of what was written since the mark, keeps what came of these first tokens, and drops what they drop.

        A token's own entry depends on nothing behind it, and a summary on its span and on summaries before it, so that
        both stay as they are; until when they may be read does depend on what was accepted, and is found anew.
        """
        lengths, before = mark
        longest = self.longest
        next_position = torch.tensor([reading.first_position + len(reading.ids) for reading in readings])
        position, order, since = (self.field(name)[:, :longest] for name in ("position", "order", "since"))
        is_new = torch.arange(longest) >= lengths[:, None]
        until = torch.full_like(position, FOREVER)
        until[:, : before.shape[1]] = before[:, :longest]
        until = torch.where(is_new, FOREVER, until)
        for row, reading in enumerate(readings):
            for event in reading.events:
                in_span = (order[row] == TOKEN) & (position[row] >= event.start) & (position[row] <= event.end)
                until[row] = torch.where(in_span, until[row].clamp(max=event.at), until[row])
        self.field("until")[:, :longest] = until
        # A summary may be read since the token behind the one at which its span was folded.
        is_accepted = torch.where(order == TOKEN, position < next_position[:, None], since <= next_position[:, None])
        self.keep((~is_new | is_accepted) & self.is_kept(self._stored(until), next_position[:, None]))
        self.has_unreadable = False

    def fork_rows(self, rows: Int[Tensor, " selected"]) -> EntrySlots:
        """A store of the given rows, in storage of its own."""
        copied = copy.copy(self)
        copied.select(rows)  # makes new tensors of all
        return copied

    def snapshot(self, *, whole: bool) -> Any:
        """One pass needs lengths and fields alone: keys and values behind the lengths don't matter."""
        return copy.deepcopy(self) if whole else (self.lengths, self.entries.clone())

    def restored(self, snapshot: Any) -> EntrySlots:
        """The store as it was when `snapshot` was taken."""
        if isinstance(snapshot, EntrySlots):
            return snapshot
        self.lengths, entries = snapshot
        self.entries[:, :, : entries.shape[2]] = entries
        self.fit()
        return self

    def counts(self, row: int) -> tuple[int, int]:
        """Folded spans of a row, and tokens that are held as they are."""
        order = self.field("order")[row, : int(self.lengths[row])]
        return int((order == OPEN + 1).sum()), int((order < OPEN).sum())

    def check_positions(self, row: int, num_tokens: int) -> None:
        """Raises `ValueError` if a row's entries are of positions that its text doesn't have."""
        position, order = (self.field(name)[row, : int(self.lengths[row])] for name in ("position", "order"))
        tokens = position[order == TOKEN]
        if len(tokens.unique()) != len(tokens) or bool((position >= num_tokens).any() | (position < 0).any()):
            raise ValueError("its entries are of positions that its text doesn't have")

    def clear(self) -> None:
        """Forgets everything; the rows stay."""
        self.lengths = torch.zeros_like(self.lengths)
        self.has_unreadable = False
        self.fit()


class CompressedCache(RowsCache):
    """The generation state of some rows of a compressed model.

    What is still held is in `num_entries`. Keys keep the rotation of their own position wherever they are stored.
    """

    def __init__(self, store: Store, rows: list[RowProgress], identity: dict[str, Any]) -> None:
        super().__init__()
        self.store = store
        self.rows = rows
        #: Each row's uncommitted ids, what was committed, and what reads ids; None where nothing is uncommitted.
        self._pending: list[list[int]] | None = None
        self._committed: Any = None
        self._read: Any = None
        #: Which model, adapter and method wrote it: it can be read by no other.
        self.identity = identity

    @property
    def can_speculate(self) -> bool:
        """Whether `autocommit` can be turned off."""
        return self.store.can_wait

    @property
    def written_by(self) -> str:
        """The method."""
        return f"the method {self.identity['method']!r}"

    def record(
        self,
        rows: list[RowProgress],
        ids: Sequence[Sequence[int]],
        num_columns: int,
        read: Callable[[RowProgress, list[int]], RowReading],
    ) -> None:
        """Moves the rows past new ids, to `rows`; with `autocommit`, commits them. `read` reads a row's ids anew."""
        if self._pending is not None or not self.autocommit:
            self._pending = [[*old, *new] for old, new in zip(self._pending or [[]] * len(ids), ids, strict=True)]
            self._read = read
        self.rows = rows
        self.num_columns += num_columns
        if self._pending is not None and self.autocommit:
            self.commit()

    def begin(self) -> None:
        """Called before each pass: marks where to go back to, if the pass is the first that isn't committed."""
        self.store.wait(not self.autocommit)
        if self._pending is None and not self.autocommit:
            self._committed = (self.store.mark(), self.rows, self.num_columns)

    def commit(self, num_tokens: Int[Tensor, " rows"] | None = None) -> None:
        pending = self._pending or [[] for _ in self.rows]
        counts = torch.tensor([len(ids) for ids in pending], dtype=torch.long)
        if num_tokens is not None:
            check_accepted(num_tokens, counts)
        if self._pending is None:
            return
        if num_tokens is None or torch.equal(num_tokens, counts):
            self.store.commit(self.num_tokens)
        else:
            mark, rows, num_columns = self._committed
            self.rows = [row.copy() for row in rows]
            accepted = [ids[:count] for ids, count in zip(pending, num_tokens.tolist(), strict=True)]
            self.store.commit_first(mark, [self._read(row, ids) for row, ids in zip(self.rows, accepted, strict=True)])
            self.num_columns = min(self.num_columns, num_columns + int(num_tokens.max()))
        self._forget_pending()

    def rollback(self) -> None:
        if self._pending is None:
            return
        mark, self.rows, self.num_columns = self._committed
        self.store.back_to(mark)
        self._forget_pending()

    def _forget_pending(self) -> None:
        self._pending = self._committed = self._read = None

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
        self._check_committed("select", is_committed=self._pending is None)
        rows = torch.as_tensor(rows).to(device="cpu", dtype=torch.long)
        self.store.select(rows)
        self.rows = [self.rows[row].copy() for row in rows.tolist()]

    def join(self, other: CompressedCache) -> None:
        """Adds another cache's rows behind these; it is used up by that.

        Raises:
            UnsupportedError: a store whose rows can't be joined, or another model's.
        """
        self._check_committed("join", is_committed=self._pending is None and other._pending is None)
        if self.identity != other.identity:
            raise UnsupportedError("caches that different models, adapters or methods wrote can't be joined.")
        self.store.join(other.store)
        self.rows += other.rows
        self.num_columns = max(self.num_columns, other.num_columns)

    def fork_rows(self, rows: Int[Tensor, " selected"]) -> CompressedCache:
        """A cache of the given rows, in storage of their own."""
        self._check_committed("fork_rows", is_committed=self._pending is None)
        rows = torch.as_tensor(rows).to(device="cpu", dtype=torch.long)
        copied = copy.copy(self)
        copied.store = self.store.fork_rows(rows)
        copied.rows = [self.rows[row].copy() for row in rows.tolist()]
        return copied

    def saved(self) -> dict[str, Tensor]:
        """Everything held, by name, and how far each row is."""
        self._check_committed("saving", is_committed=self._pending is None)
        saved = self.store.saved()
        for number, row in enumerate(self.rows):
            saved[f"progress.{number}"] = torch.tensor([row.num_tokens, row.num_cached, row.next_start])
            saved[f"notes.{number}"] = torch.tensor(row.notes, dtype=torch.float64)
            if row.window:
                saved[f"window.{number}"] = torch.tensor(row.window)
        return saved | {"num_columns": torch.tensor(self.num_columns)}

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave, of a cache of the same model and as many rows.

        Raises:
            KeyError, ValueError: something is missing, or of another shape.
        """
        rows = []
        for number in range(self.num_rows):
            num_tokens, num_cached, next_start = saved[f"progress.{number}"].tolist()
            notes: list[float] = [
                int(note) if note.is_integer() else note for note in saved[f"notes.{number}"].tolist()
            ]
            window = saved[f"window.{number}"].tolist() if f"window.{number}" in saved else []
            rows.append(RowProgress(num_tokens, num_cached, next_start, notes, window))
        num_columns = int(saved["num_columns"])
        self.store.restore_saved(saved)
        self.rows, self.num_columns = rows, num_columns
        self._forget_pending()

    def snapshot(self, *, whole: bool) -> Any:
        """What `restore` needs to undo a forward pass, or, if `whole`, several."""
        return self.store.snapshot(whole=whole)

    def restore(self, snapshot: Any) -> None:
        """Undoes a pass that failed; a store of which nothing was kept is emptied, and so the cache."""
        if snapshot is None:
            self.reset()
        else:
            self.store = self.store.restored(snapshot)

    def reset(self) -> None:
        """Forgets everything; the rows stay."""
        self.rows = [RowProgress() for _ in self.rows]
        self.num_columns = 0
        self._forget_pending()
        self.store.clear()

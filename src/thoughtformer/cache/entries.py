"""Where entries of compressed texts are: what every store can do, and slots that all layers and heads hold alike."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.cache.slots import RowSlots
from thoughtformer.rules.entries import FOREVER, OPEN, PADDING, TOKEN, Entries
from thoughtformer.rules.schedule import Chunk, RowReading

__all__ = ["BLOCK_ENTRIES", "ENTRY_FIELDS", "EntrySlots", "Store"]

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

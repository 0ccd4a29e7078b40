"""When tokens are dropped or folded: events of a row, and the entries that a forward pass over new tokens computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from thoughtformer.rules.entries import FOREVER, OPEN, PADDING, TOKEN, Entries

__all__ = ["Chunk", "Event", "RowProgress", "RowReading", "lay_out"]


class Event(NamedTuple):
    """Tokens at positions `start` to `end`, both included, are dropped once token `at` was read.

    With `is_fold`, their summaries can be read instead, from token `at + 1` on.
    """

    start: int
    end: int
    at: int
    is_fold: bool = False


@dataclass
class RowProgress:
    """How far a row has been read and compressed.

    Attributes:
        num_tokens: tokens read.
        num_cached: entries that the next token may read.
        next_start: first position that was neither dropped nor folded, nor is kept for good, where a method goes on in
            text order.
        notes: whatever else a method remembers; numbers, so that it can be saved.
        window: ids of the last tokens, as many as the method asks for.
    """

    num_tokens: int = 0
    num_cached: int = 0
    next_start: int = 0
    notes: list[int | float] = field(default_factory=list)
    window: list[int] = field(default_factory=list)

    def copy(self) -> RowProgress:
        return RowProgress(self.num_tokens, self.num_cached, self.next_start, self.notes.copy(), self.window.copy())


class RowReading(NamedTuple):
    """New ids of one row, the position of the first, and the events that fall on them."""

    ids: Sequence[int]
    first_position: int
    events: Sequence[Event]

    def piece(self, start: int, end: int) -> RowReading:
        """The part of it whose tokens have these numbers among the new ones."""
        # A row that has ended stays where it is.
        first, ids = self.first_position + min(start, len(self.ids)), self.ids[start:end]
        return RowReading(ids, first, [event for event in self.events if first <= event.at < first + len(ids)])


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one forward pass computes: new tokens, and the sentinels of the spans that fold at them.

    Attributes:
        input_ids: rows padded at the end with 0; sentinels have the ids from `vocab_size` on.
        entries: of the same shape.
        token_column: where each row's new tokens are, padded with 0.
        num_new: new tokens of each row.
        next_position: of each row's first token to come.
        until, span: by row and position, what the events change of tokens read before; None where nothing changes.
    """

    input_ids: Int[Tensor, "rows entries"]
    entries: Entries
    token_column: Int[Tensor, "rows new"]
    num_new: Int[Tensor, " rows"]
    next_position: Int[Tensor, " rows"]
    until: Int[Tensor, "rows positions"] | None
    span: Int[Tensor, "rows positions"] | None

    @property
    def has_events(self) -> bool:
        """Whether anything is dropped or folded."""
        return self.until is not None


def lay_out(readings: Sequence[RowReading], *, vocab_size: int, num_summaries: int) -> Chunk:
    """The entries of some rows' new tokens. A span's sentinels stand behind the token at which it is folded.

    Where they stand changes nothing that anybody reads; here they are known by the time they are needed.
    """
    has_events = any(reading.events for reading in readings)
    parts = [_row(reading, vocab_size, num_summaries) for reading in readings]
    width = max((len(ids) for ids, *_ in parts), default=0)
    num_new = torch.tensor([len(reading.ids) for reading in readings], dtype=torch.long)
    input_ids = np.zeros((len(parts), width), dtype=np.int64)
    fields = np.zeros((5, len(parts), width), dtype=np.int32)
    fields[1] = PADDING
    fields[2] = -1
    token_column = np.zeros((len(parts), int(num_new.max()) if len(parts) else 0), dtype=np.int64)
    for row, (ids, values, columns, *_) in enumerate(parts):
        input_ids[row, : len(ids)] = ids
        fields[:, row, : len(ids)] = values
        token_column[row, : len(columns)] = columns
    until = span = None
    if has_events:
        length = max(len(part[3]) for part in parts)
        tables = np.full((2, len(parts), length), FOREVER, dtype=np.int32)
        tables[1] = -1
        for row, part in enumerate(parts):
            tables[0, row, : len(part[3])], tables[1, row, : len(part[4])] = part[3], part[4]
        until, span = torch.from_numpy(tables[0]), torch.from_numpy(tables[1])
    return Chunk(
        input_ids=torch.from_numpy(input_ids),
        entries=Entries(*(torch.from_numpy(values) for values in fields)),
        token_column=torch.from_numpy(token_column),
        num_new=num_new,
        next_position=torch.tensor([reading.first_position for reading in readings], dtype=torch.long) + num_new,
        until=until,
        span=span,
    )


def _row(
    reading: RowReading, vocab_size: int, num_summaries: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, fields (five by entry), the tokens' columns, and `until` and `span` by position."""
    first, num_tokens = reading.first_position, len(reading.ids)
    ids = np.asarray(reading.ids, dtype=np.int64)
    until = np.full(first + num_tokens, FOREVER, dtype=np.int32)
    span = np.full(first + num_tokens, -1, dtype=np.int32)
    folds = []
    for number, event in enumerate(reading.events):
        until[event.start : event.end + 1] = event.at
        if event.is_fold:
            span[event.start : event.end + 1] = number
            folds.append((number, event))
    position = np.arange(first, first + num_tokens, dtype=np.int32)
    order = np.full(num_tokens, TOKEN, dtype=np.int32)
    fields = np.stack([position, order, span[first:], position, until[first:]])
    columns = np.arange(num_tokens)
    if folds and num_summaries:
        size = 1 + num_summaries
        number = np.repeat([number for number, _ in folds], size)
        start = np.repeat([event.start for _, event in folds], size)
        end = np.repeat([event.end for _, event in folds], size)
        at = np.repeat([event.at for _, event in folds], size)
        order = np.tile(np.arange(OPEN, OPEN + size), len(folds))
        since = np.where(order == OPEN, FOREVER, at + 1)
        # The opening copies the position before its span, summaries the span's last.
        position = np.where(order == OPEN, np.maximum(start - 1, 0), end)
        sentinels = np.stack([position, order, number, since, np.full_like(end, FOREVER)]).astype(np.int32)
        where = at - first + 1
        ids = np.insert(ids, where, vocab_size + order - OPEN)
        fields = np.insert(fields, where, sentinels, axis=1)
        columns = np.flatnonzero(fields[1] == TOKEN)
    return ids, fields, columns, until, span

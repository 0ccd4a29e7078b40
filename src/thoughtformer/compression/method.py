"""What a compression method is: a frozen dataclass that says, token by token, what is dropped or folded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from thoughtformer.attention.schedule import Event, RowProgress, RowReading
from thoughtformer.checks import check_fields

__all__ = ["Method", "entries_held", "read_ids"]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A rule of what later tokens may still read.

    `after` is asked once for each token, in order, whether the text is read at once or token by token: its answer may
    depend on the row's own past alone.
    """

    name: ClassVar[str]
    #: The method's sentinels, which need an adapter.
    needs_adapter: ClassVar[bool] = False
    #: Summaries are means of the span's keys and values instead of sentinels that the model reads.
    is_pooled: ClassVar[bool] = False
    #: Each layer and head keeps entries of its own, by what its attention was.
    is_by_attention: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def num_summaries(self) -> int:
        """Entries that stay of a folded span."""
        return 0

    @property
    def reads_ids(self) -> bool:
        """What happens depends on which tokens are read, not on their number alone."""
        return False

    @abstractmethod
    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        """What happens now that token number `row.num_tokens - 1` was read. May change `next_start` and `notes`."""


def read_ids(method: Method, row: RowProgress, ids: list[int]) -> RowReading:
    """Reads new tokens: their events, with `row` moved past them."""
    first, events = row.num_tokens, []
    for token_id in ids:
        row.num_tokens += 1
        row.num_held += 1
        for event in method.after(row, token_id):
            row.num_held -= event.end - event.start + 1 - (method.num_summaries if event.is_fold else 0)
            events.append(event)
    return RowReading(ids, first, events)


def entries_held(method: Method, ids: Sequence[int]) -> list[int]:
    """Entries that each token of a text can read, itself included, by the schedule alone."""
    row, held = RowProgress(), []
    for token_id in ids:
        held.append(row.num_held + 1)
        read_ids(method, row, [token_id])
    return held

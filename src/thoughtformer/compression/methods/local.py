"""A window that grows with the text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thoughtformer.checks import check_fraction
from thoughtformer.compression.method import Method
from thoughtformer.compression.solving import Search
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["Local"]


@dataclass(frozen=True, kw_only=True)
class Local(Method):
    """Token j reads tokens from floor(j * removed) on."""

    name = "local"
    removed: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("removed", self.removed)

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        first = math.floor(row.num_tokens * self.removed)
        if first > row.next_start:
            yield Event(row.next_start, first - 1, row.num_tokens - 1)
            row.next_start = first

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[Local]:
        yield search.crossing(lambda fraction: cls(removed=fraction), search.fractions)

"""A number of entries, of which a random one makes room."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thoughtformer.checks import check_count
from thoughtformer.compression.draws import uniform
from thoughtformer.compression.method import Method
from thoughtformer.compression.solving import Search
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["RandomEviction"]


@dataclass(frozen=True, kw_only=True)
class RandomEviction(Method):
    """Holds `max_entries` at most: when full, a random token makes room, but not the first or the most recent ones."""

    name = "random"
    max_entries: int = 64
    first_tokens: int = 4
    recent_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first_tokens", self.first_tokens, 0)
        check_count("recent_tokens", self.recent_tokens, 0)
        check_count("max_entries", self.max_entries, self.first_tokens + self.recent_tokens + 1)

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        # Notes: a heap of pairs (draw, position), flattened; the smallest draw goes first.
        leaving = row.num_tokens - 1 - self.recent_tokens
        heap = [(row.notes[i], row.notes[i + 1]) for i in range(0, len(row.notes), 2)]
        if leaving >= self.first_tokens:
            heapq.heappush(heap, (uniform(self.seed, leaving), float(leaving)))
        # The next token needs a place as well.
        if row.num_cached >= self.max_entries and heap:
            position = int(heapq.heappop(heap)[1])
            yield Event(position, position, row.num_tokens - 1)
        row.notes = [number for pair in heap for number in pair]

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[RandomEviction]:
        yield search.crossing(
            lambda entries: cls(max_entries=entries, seed=search.seed, recent_tokens=min(16, entries // 4)),
            search.budgets,
        )

"""Methods that only drop tokens, by position: full, truncation, local, scattered, random."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

from thoughtformer.attention.schedule import Event, RowProgress
from thoughtformer.checks import check_count, check_fraction
from thoughtformer.compression.method import Method

__all__ = ["Full", "Local", "RandomEviction", "Scattered", "Truncation"]


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Drops nothing."""

    name = "full"

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        return ()


@dataclass(frozen=True, kw_only=True)
class Truncation(Method):
    """Cuts the text into pieces of `piece_tokens` and reads each without the ones before."""

    name = "truncation"
    piece_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("piece_tokens", self.piece_tokens, 1)

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        if row.num_tokens % self.piece_tokens == 0:
            yield Event(row.num_tokens - self.piece_tokens, row.num_tokens - 1, row.num_tokens - 1)


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


def _uniform(seed: int, position: int) -> float:
    """A number from 0 to 1 that depends on seed and position alone (SplitMix64): the same for every row and batch."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & (1 << 64) - 1
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (1 << 64) - 1
    return ((mixed ^ (mixed >> 31)) >> 11) / (1 << 53)


@dataclass(frozen=True, kw_only=True)
class Scattered(Method):
    """Each position is kept with probability `1 - removed`, for all queries alike; a token always reads itself."""

    name = "scattered"
    removed: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("removed", self.removed)

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        position = row.num_tokens - 1
        if _uniform(self.seed, position) < self.removed:
            yield Event(position, position, position)


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
            heapq.heappush(heap, (_uniform(self.seed, leaving), float(leaving)))
        # The next token needs a place as well.
        if row.num_held >= self.max_entries and heap:
            position = int(heapq.heappop(heap)[1])
            yield Event(position, position, row.num_tokens - 1)
        row.notes = [number for pair in heap for number in pair]

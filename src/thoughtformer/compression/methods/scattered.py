"""Positions chosen once for all queries, by a draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thoughtformer.checks import check_fraction
from thoughtformer.compression.draws import uniform
from thoughtformer.compression.method import Method
from thoughtformer.compression.solving import Search
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["Scattered"]


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
        if uniform(self.seed, position) < self.removed:
            yield Event(position, position, position)

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[Scattered]:
        for draw in range(3):
            yield search.nearest(
                lambda fraction, draw=draw: cls(removed=fraction, seed=search.seed + 1000 * draw), search.fractions
            )

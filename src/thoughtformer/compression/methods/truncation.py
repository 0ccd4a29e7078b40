"""Pieces that are read without the ones before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thoughtformer.checks import check_count
from thoughtformer.compression.method import Method
from thoughtformer.compression.solving import Search
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["Truncation"]


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

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[Truncation]:
        yield search.nearest(lambda tokens: cls(piece_tokens=tokens), search.budgets)

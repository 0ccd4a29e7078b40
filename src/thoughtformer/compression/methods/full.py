"""Nothing dropped: the model as it is, beside which methods are judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from thoughtformer.compression.method import Method
from thoughtformer.compression.solving import Search

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Drops nothing."""

    name = "full"

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[Full]:
        yield cls()

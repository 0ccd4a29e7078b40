"""H2O (Zhang et al., arXiv 2306.14048): each head holds what was attended to most, and what is recent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thoughtformer.checks import check_count, check_fraction
from thoughtformer.compression.one_by_one import OneByOne

__all__ = ["HeavyHitters"]


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(OneByOne):
    """Holds `max_entries` for each layer and key head; when full, the least attended of the older ones makes room.

    What is attended is summed over all queries since the token was read, and over the query heads that share the key
    head (algorithm 1, with grouped heads taken together).
    """

    name = "h2o"
    recent_fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_entries", self.max_entries, 2)
        check_fraction("recent_fraction", self.recent_fraction)

    @property
    def recent_tokens(self) -> int:
        return min(max(1, round(self.max_entries * self.recent_fraction)), self.max_entries - 1)

    def weighed(self, before: Tensor, weights: Tensor) -> Tensor:
        return before + weights.sum(dim=2)

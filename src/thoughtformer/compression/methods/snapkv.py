"""SnapKV (Li et al., arXiv 2404.14469): what the last queries attend to is kept. PyramidKV's budgets (2406.02069)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore
from thoughtformer.checks import check_count
from thoughtformer.compression.by_interval import AttendByInterval, ByInterval
from thoughtformer.compression.in_pieces import Queries
from thoughtformer.compression.method import PassAttention
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError
from thoughtformer.models.backbone import Backbone
from thoughtformer.rules.schedule import Chunk

__all__ = ["SnapKV"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(ByInterval):
    """Keeps the `observed_tokens` last entries, and of the others those that their queries attend to most.

    Attention is summed over these queries and over the query heads that share a key head, and averaged over
    `pooled_entries` neighbours, so that what stands together stays together (section 4.2).

    Args:
        observed_tokens: at the end of each interval; the paper's observation window.
        pooled_entries: an odd number; 1 for no pooling.
        pyramid: how many times the last layer's budget the first one's is; budgets fall evenly in between.
    """

    name = "snapkv"
    observed_tokens: int = 32
    pooled_entries: int = 5
    pyramid: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("observed_tokens", self.observed_tokens, 1)
        check_count("pooled_entries", self.pooled_entries, 1)
        if self.pooled_entries % 2 == 0:
            raise ConfigError(f"pooled_entries={self.pooled_entries} has no middle: give an odd number.")
        if self.observed_tokens > self.every_tokens:
            raise ConfigError(
                f"observed_tokens={self.observed_tokens} is more than every_tokens={self.every_tokens}: queries before "
                "the last choice can't be observed."
            )
        if not 1 <= self.pyramid < float("inf"):
            raise ConfigError(f"pyramid={self.pyramid}: give 1 for equal budgets, or more.")
        least = min(self.budgets(self.layers))
        if least <= self.observed_tokens:
            raise ConfigError(
                f"a layer's budget of {least} entries (max_entries={self.max_entries}, pyramid={self.pyramid}) leaves "
                f"nothing beside observed_tokens={self.observed_tokens}, which always stay."
            )

    def budgets(self, num_layers: int) -> list[int]:
        if num_layers == 1:
            return [self.max_entries]
        share = [self.pyramid + (1 - self.pyramid) * layer / (num_layers - 1) for layer in range(num_layers)]
        total = self.max_entries * num_layers / sum(share)
        ends = [round(total * sum(share[:layer])) for layer in range(num_layers + 1)]
        return [ends[layer + 1] - ends[layer] for layer in range(num_layers)]

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendObserved(chunk, self, store)

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[SnapKV]:
        def make(entries: int) -> SnapKV:
            interval = max(1, min(64, entries // 4))
            return cls(max_entries=entries, every_tokens=interval, observed_tokens=min(32, interval))

        yield search.crossing(make, search.budgets)


class AttendObserved(AttendByInterval[SnapKV]):
    """Sums what the last queries of an interval attend to."""

    def see(self, layer: int, queries: Queries, weights: Tensor) -> None:
        every, observed = self.method.every_tokens, self.method.observed_tokens
        is_observed = queries.is_token & (queries.position % every >= every - observed)
        if bool(is_observed.any()):
            self.store["attention"][layer] += weights.masked_fill(~is_observed[:, None, None, :, None], 0).sum(
                dim=(2, 3)
            )

    def worth(self, layer: int, row: int, num_entries: int, *, num_tokens: int, scale: float) -> Tensor:
        held, attention = (self.store[name][layer][row, :, :num_entries] for name in ("position", "attention"))
        stays = held >= num_tokens - self.method.observed_tokens
        width = self.method.pooled_entries
        pooled = F.avg_pool1d(attention.masked_fill(stays, 0), width, stride=1, padding=width // 2)
        return pooled.masked_fill(stays, float("inf"))

    def forget(self, layer: int, row: int) -> None:
        self.store["attention"][layer][row] = 0

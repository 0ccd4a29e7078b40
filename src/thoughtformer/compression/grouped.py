"""A pass over a model whose layers attend in several ways: each group its attention and its slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.groups import LayerGroup, WindowSlots
from thoughtformer.compression.at_once import AttendAtOnce
from thoughtformer.compression.method import Method, PassAttention
from thoughtformer.compression.on_cache import AttendOnCache
from thoughtformer.models.backbone import Backbone
from thoughtformer.rules.schedule import Chunk, RowProgress

__all__ = ["AttendByGroup", "InWindow"]


class AttendByGroup:
    """Hands each layer on to its group's attention, by its number within the group."""

    def __init__(self, groups: Sequence[LayerGroup], attentions: Sequence[PassAttention]) -> None:
        self.attentions = attentions
        self.places = {
            layer: (attention, number)
            for group, attention in zip(groups, attentions, strict=True)
            for number, layer in enumerate(group.layers)
        }

    def finish(self) -> None:
        """Drops what no later token may read, in every group."""
        for attention in self.attentions:
            attention.finish()

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
        **settings: Any,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        attention, number = self.places[layer]
        return attention(number, query, key, value, **settings)


@dataclass(frozen=True, kw_only=True)
class InWindow(Method):
    """What layers with a window hold under a method: raw tokens, as long as they are near.

    Args:
        window: how many of the last tokens a token reads, itself included.
        beside: the method, which acts on other layers; what its sentinels have yet to read is held here as well.
    """

    window: int
    beside: Method

    @property
    def holds_spans(self) -> bool:
        """Older tokens stay until they are folded."""
        return self.beside.num_sentinels_read > 0

    def num_stored(self, row: RowProgress) -> int:
        start = max(row.num_tokens - self.window + 1, 0)
        return row.num_tokens - start + self.beside.num_awaited(row, start)

    def new_store(self, **shape: Any) -> Store:
        return WindowSlots(self.window, holds_spans=self.holds_spans, **shape)

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert store is None or isinstance(store, WindowSlots)
        if store is None or (store.longest == 0 and not store.waits):
            return AttendAtOnce(
                chunk.entries, store, has_events=chunk.has_events, execution=execution, window=self.window
            )
        return AttendOnCache(chunk, store)

"""A pass over a model whose layers attend in several ways: each group its attention and its slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.groups import LayerGroup, WindowSlots
from thoughtformer.compression.at_once import AttendAtOnce
from thoughtformer.compression.method import PassAttention
from thoughtformer.compression.on_cache import AttendOnCache
from thoughtformer.rules.schedule import Chunk

__all__ = ["AttendByGroup", "attend_in_window"]


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


def attend_in_window(chunk: Chunk, slots: WindowSlots | None, *, window: int, execution: str) -> PassAttention:
    """The attention of layers with a window, under any method."""
    if slots is None or (slots.longest == 0 and not slots.waits):
        return AttendAtOnce(chunk.entries, slots, has_events=chunk.has_events, execution=execution, window=window)
    return AttendOnCache(chunk, slots)

"""What a model's layers hold under a method: each group its holder, its slots, its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.groups import GroupedStore, LayerGroup, WindowSlots
from thoughtformer.cache.shape import KVShape
from thoughtformer.compression.at_once import AttendAtOnce
from thoughtformer.compression.method import CacheBytes, LayersShape, Method, PassAttention
from thoughtformer.compression.on_cache import AttendOnCache
from thoughtformer.models.backbone import Backbone
from thoughtformer.rules.schedule import Chunk, RowProgress

__all__ = ["AttendByGroup", "Holding", "InWindow", "shape_of"]


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

    def new_store(self, shape: KVShape, devices: Sequence[torch.device]) -> Store:
        return WindowSlots(self.window, shape, devices, holds_spans=self.holds_spans)

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert store is None or isinstance(store, WindowSlots)
        if store is None or (store.longest == 0 and not store.waits):
            return AttendAtOnce(
                chunk.entries, store, has_events=chunk.has_events, execution=execution, window=self.window
            )
        return AttendOnCache(chunk, store)


def shape_of(backbone: Backbone) -> LayersShape:
    """What entries take in the layers that a method acts on, and which others there are."""
    return LayersShape(
        kv=backbone.kv_shape(backbone.groups[0].layers),
        num_heads=backbone.num_heads,
        max_tokens=backbone.max_tokens,
        windows=[
            (group.window, backbone.kv_shape(group.layers)) for group in backbone.groups if group.window is not None
        ],
    )


class Holding:
    """The stores of a model's layers, group by group: the method's own, and what stands in for it under a window."""

    def __init__(self, backbone: Backbone, method: Method) -> None:
        self.backbone = backbone
        self.groups = backbone.groups
        self.method = method
        #: What holds each group's layers.
        self.holders = [method] + [
            method.in_window(group.window) or InWindow(window=group.window, beside=method)
            for group in self.groups
            if group.window is not None
        ]

    def new_store(self, num_rows: int) -> Store:
        """Empty stores behind one face, on the layers' devices."""
        devices = self.backbone.devices
        parts = [
            holder.new_store(self.backbone.kv_shape(group.layers, num_rows), [devices[layer] for layer in group.layers])
            for holder, group in zip(self.holders, self.groups, strict=True)
        ]
        return parts[0] if len(parts) == 1 else GroupedStore(parts)

    def num_stored(self, row: RowProgress) -> tuple[int, ...]:
        """Entries held of a row, in each part that is sized by itself."""
        return tuple(entries for holder in self.holders for entries in holder.stored_parts(row))

    def num_bytes(
        self, longest_row_entries: Sequence[int], num_rows: int, dtype: torch.dtype | None, kind: CacheBytes
    ) -> int:
        """What the tensors of `new_store` must measure once they hold that; see `CompressedModel.cache_bytes`."""
        total, longest = 0, list(longest_row_entries)
        for holder, group in zip(self.holders, self.groups, strict=True):
            parts = [longest.pop(0) for _ in holder.stored_parts(RowProgress())]
            count = {"stored": holder.store_bytes, "resident": holder.resident_bytes, "read": holder.read_bytes}[kind]
            total += count(parts, self.backbone.kv_shape(group.layers, num_rows, dtype))
        assert not longest
        return total

    def attend(self, chunk: Chunk, store: Store | None, *, execution: str) -> PassAttention:
        """The attention of a pass: the method's, and that of each window beside it."""
        parts = store.parts if isinstance(store, GroupedStore) else [store] * len(self.groups)
        return self._by_group(
            [
                holder.attend(chunk, part, backbone=self.backbone, execution=execution)
                for holder, part in zip(self.holders, parts, strict=True)
            ]
        )

    def attend_again(self, chunk: Chunk, store: Store, *, execution: str) -> PassAttention:
        """That of a second reading, of which no layer keeps anything."""
        rows = torch.arange(len(store.lengths))
        first, *others = store.parts if isinstance(store, GroupedStore) else [store]
        attentions = [self.method.attend_again(chunk, first, backbone=self.backbone)]
        for holder, part in zip(self.holders[1:], others, strict=True):
            attentions.append(holder.attend(chunk, part.fork_rows(rows), backbone=self.backbone, execution=execution))
        return self._by_group(attentions)

    def _by_group(self, attentions: list[PassAttention]) -> PassAttention:
        return attentions[0] if len(attentions) == 1 else AttendByGroup(self.groups, attentions)

"""Attention of new entries to all that a cache holds."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.entries import ENTRY_FIELDS, EntrySlots
from thoughtformer.compression.at_once import additive
from thoughtformer.compression.on_devices import OnDevices
from thoughtformer.models.backbone import Original
from thoughtformer.rules.entries import PADDING, Entries, entries_mask
from thoughtformer.rules.schedule import Chunk

__all__ = ["AttendOnCache"]


class AttendOnCache:
    """New entries are written behind what is cached, and read it under the mask where one is needed.

    Methods that attend in a way of their own derive from it: `new_fields` and `with_summaries` say what is written,
    `see` looks at all that can be read, `write` and `attend` are a layer's.

    Args:
        chunk: the new entries.
        slots: extended here; what the chunk's events drop is still there while the chunk is computed.
        see_earlier: as in `visible`.
    """

    #: `attend` is called whether or not a mask is needed.
    always_masks: ClassVar[bool] = False

    def __init__(self, chunk: Chunk, slots: EntrySlots, *, see_earlier: bool = False) -> None:
        entries = chunk.entries
        was_empty = slots.longest == 0
        self.slots = slots
        drops = chunk.has_events or slots.window is not None
        self.next_position = chunk.next_position if drops else None
        self.row, self.column = (entries.order != PADDING).nonzero(as_tuple=True)
        self.slot = slots.extend_rows(self.row, self.new_fields(entries))
        self.num_keys = slots.longest
        self.mask: OnDevices[Tensor] | None = None
        is_step = entries.order.shape[1] == 1 and not chunk.has_events
        reads_all = bool((slots.lengths == slots.longest).all()) and not chunk.has_events and (is_step or was_empty)
        reads_all = reads_all and not slots.has_unreadable
        reads_all = reads_all and (slots.window is None or slots.longest <= slots.window)
        if reads_all and not self.always_masks:
            return
        cached = slots.entries_for(chunk)
        # A new entry's span is in the chunk; it is stored nowhere.
        cached.span[self.row, self.slot] = entries.span[self.row, self.column].to(cached.span.dtype)
        cached = self.with_summaries(chunk, cached)
        self.num_keys = slots.longest
        mask = entries_mask(slots.seen(entries), slots.seen(cached), see_earlier=see_earlier)
        mask &= slots.is_cached().unsqueeze(1) | (entries.order == PADDING).unsqueeze(2)
        self.mask = OnDevices(mask)
        self.see(cached)

    def new_fields(self, entries: Entries) -> dict[str, Tensor]:
        """Every field of the new entries."""
        return {name: getattr(entries, name)[self.row, self.column] for name in ENTRY_FIELDS}

    def with_summaries(self, chunk: Chunk, cached: Entries) -> Entries:
        """All that is cached, with entries of the method's own making added."""
        return cached

    def see(self, cached: Entries) -> None:
        """Takes from what is cached whatever `attend` needs."""

    def finish(self) -> None:
        """Drops what no later token may read."""
        self.slots.finish(self.next_position)

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
        *,
        scale: float,
        dropout: float,
        original: Original,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        self.write(layer, key, value)
        keys, values = (part[layer][:, :, : self.num_keys] for part in (self.slots.keys, self.slots.values))
        if self.mask is None:
            return original(query, keys, values, None)
        mask = additive(self.mask.at(query.device), query)
        return self.attend(query, keys, values, mask, scale=scale, original=original)

    def write(
        self,
        layer: int,
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
    ) -> None:
        """Stores what a layer makes of the new entries."""
        key, value = (part[self.row, :, self.column] for part in (key, value))
        self.slots.write(layer, self.row, self.slot, key, value)

    def attend(
        self,
        query: Float[Tensor, "batch heads seq head_dim"],
        keys: Float[Tensor, "batch kv_heads entries head_dim"],
        values: Float[Tensor, "batch kv_heads entries head_dim"],
        mask: Float[Tensor, "batch 1 seq entries"],
        *,
        scale: float,
        original: Original,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """A layer's attention under the mask."""
        return original(query, keys, values, mask)

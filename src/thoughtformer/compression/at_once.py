"""Attention among entries of rows that have read nothing before: blocks, masks, or FlexAttention."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thoughtformer.attention.blocks import AttentionPlan
from thoughtformer.cache.entries import EntrySlots
from thoughtformer.compression.on_devices import OnDevices
from thoughtformer.errors import UnsupportedError
from thoughtformer.models.backbone import Original
from thoughtformer.rules.entries import PADDING, Entries, entries_mask, entries_plan, in_window, visible

__all__ = ["EXECUTIONS", "AttendAtOnce", "additive"]

#: How a chunk with nothing held before it attends: all are the same function.
EXECUTIONS = ("gathered", "dense", "flex")


def additive(mask: Bool[Tensor, "rows queries keys"], like: Tensor) -> Float[Tensor, "rows 1 queries keys"]:
    """A mask as every attention backend takes it: bool masks of four dimensions are silently wrong in eager ones."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, torch.finfo(like.dtype).min).unsqueeze(1)


class AttendAtOnce:
    """Entries of rows that have read nothing before; what later tokens may read goes to `slots`, if there are any.

    `has_events` is whether any of the entries is dropped or folded; `window` that of the layers, None for all tokens.
    """

    def __init__(
        self,
        entries: Entries,
        slots: EntrySlots | None,
        *,
        has_events: bool,
        execution: str,
        see_earlier: bool = False,
        window: int | None = None,
    ) -> None:
        self.num_entries = entries.order.shape[1]
        self.is_plain = not has_events and not bool((entries.order == PADDING).any())
        seen = entries
        if window is not None:
            self.is_plain &= self.num_entries <= window
            seen = in_window(entries, window)
        self.plan: OnDevices[AttentionPlan] | None = None
        self.mask: OnDevices[Tensor] | None = None
        self.block_mask: OnDevices[_FlexMask] | None = None
        if not self.is_plain and execution == "gathered":
            self.plan = OnDevices(entries_plan(seen, see_earlier=see_earlier))
        elif not self.is_plain and execution == "dense":
            self.mask = OnDevices(entries_mask(seen, seen, see_earlier=see_earlier))
        elif not self.is_plain:
            self.block_mask = OnDevices(_FlexMask(seen, see_earlier))
        self.slots = slots
        if slots is not None:
            # Only what is kept is written, so that memory never holds more.
            next_position = torch.where(entries.order == 0, entries.position, -1).amax(dim=1, keepdim=True) + 1
            self.row, self.column = slots.is_kept(entries, next_position).nonzero(as_tuple=True)
            fields = {name: getattr(entries, name)[self.row, self.column] for name in slots.fields}
            self.slot = slots.extend_rows(self.row, fields)

    def finish(self) -> None:
        """Gives back room that isn't needed."""
        if self.slots is not None:
            self.slots.fit()

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
        if self.slots is not None:
            self.slots.write(layer, self.row, self.slot, key[self.row, :, self.column], value[self.row, :, self.column])
        if self.is_plain and self.slots is not None:
            # As transformers' cache hands them on: the same bits.
            return original(query, key.contiguous(), value.contiguous(), None)
        if self.is_plain:
            return original(query, key, value, None)
        if self.mask is not None:
            return original(query, key, value, additive(self.mask.at(query.device), query))
        if self.block_mask is not None:
            from torch.nn.attention.flex_attention import flex_attention

            mask = self.block_mask.at(query.device).made
            grouped = query.shape[1] != key.shape[1]
            output = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
            assert isinstance(output, Tensor)
            return output
        assert self.plan is not None
        batch, heads, seq, head_dim = query.shape
        flat = (part.transpose(1, 2).reshape(batch * seq, part.shape[1], head_dim) for part in (query, key, value))
        output = self.plan.at(query.device).attend(*flat, scale=scale, dropout=dropout)
        return output.view(batch, seq, heads, head_dim).transpose(1, 2)


class _FlexMask:
    """FlexAttention's mask of entries, made on a device."""

    def __init__(self, entries: Entries, see_earlier: bool) -> None:
        self.entries, self.see_earlier = entries, see_earlier
        self.made: Any = None

    def to(self, device: torch.device) -> _FlexMask:
        from torch.nn.attention.flex_attention import create_block_mask

        entries, see_earlier = self.entries.to(device), self.see_earlier

        def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            queries, keys = entries[batch, query], entries[batch, key]
            # A padded query reads itself, so that its row is not empty.
            return visible(queries, keys, see_earlier=see_earlier) | ((queries.order == PADDING) & (query == key))

        if device.type == "cpu" and torch.is_grad_enabled():
            raise UnsupportedError("FlexAttention has no backward pass on CPUs: train with execution='gathered'.")
        num_rows, num_entries = entries.order.shape
        there = _FlexMask(entries, see_earlier)
        there.made = create_block_mask(reads, num_rows, None, num_entries, num_entries, device=str(device))
        return there

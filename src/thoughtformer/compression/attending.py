"""Attention of one forward pass over a chunk, by the schedule's entries: at once, or onto what a cache holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from thoughtformer.attention.entries import FOREVER, OPEN, PADDING, Entries, entries_mask, entries_plan, visible
from thoughtformer.attention.schedule import Chunk
from thoughtformer.cache.compressed import EntrySlots
from thoughtformer.errors import UnsupportedError
from thoughtformer.models.backbone import Original, Rotation

__all__ = ["EXECUTIONS", "AttendAtOnce", "AttendHeld"]

#: How a chunk with nothing held before it attends: all are the same function.
EXECUTIONS = ("gathered", "dense", "flex")


def additive(mask: Bool[Tensor, "rows queries keys"], like: Tensor) -> Float[Tensor, "rows 1 queries keys"]:
    """A mask as every attention backend takes it: bool masks of four dimensions are silently wrong in eager ones."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, torch.finfo(like.dtype).min).unsqueeze(1)


class AttendAtOnce:
    """Entries of rows that have read nothing before; what later tokens may read goes to `slots`, if there are any.

    `has_events` is whether any of the entries is dropped or folded.
    """

    def __init__(
        self,
        entries: Entries,
        slots: EntrySlots | None,
        device: torch.device,
        *,
        has_events: bool,
        execution: str,
        see_earlier: bool,
    ) -> None:
        self.num_entries = entries.order.shape[1]
        self.is_plain = not has_events and not bool((entries.order == PADDING).any())
        self.plan = self.mask = self.block_mask = None
        if not self.is_plain and execution == "gathered":
            self.plan = entries_plan(entries, see_earlier=see_earlier).to(device)
        elif not self.is_plain and execution == "dense":
            self.mask = entries_mask(entries, entries, see_earlier=see_earlier).to(device)
        elif not self.is_plain:
            self.block_mask = _flex_mask(entries.to(device), see_earlier)
        self.slots = slots
        if slots is not None:
            # Only what is kept is written, so that memory never holds more.
            next_position = torch.where(entries.order == 0, entries.position, -1).amax(dim=1, keepdim=True) + 1
            kept = (entries.order != PADDING) & (entries.order != OPEN) & (entries.until >= next_position)
            self.row, self.column = kept.nonzero(as_tuple=True)
            fields = {name: getattr(entries, name)[self.row, self.column] for name in slots.fields}
            self.slot = slots.extend_rows(self.row, fields)

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
            return original(query, key, value, additive(self.mask, query))
        if self.block_mask is not None:
            from torch.nn.attention.flex_attention import flex_attention

            grouped = query.shape[1] != key.shape[1]
            output = flex_attention(query, key, value, block_mask=self.block_mask, scale=scale, enable_gqa=grouped)
            assert isinstance(output, Tensor)
            return output
        assert self.plan is not None
        batch, heads, seq, head_dim = query.shape
        flat = (part.transpose(1, 2).reshape(batch * seq, part.shape[1], head_dim) for part in (query, key, value))
        output = self.plan.attend(*flat, scale=scale, dropout=dropout)
        return output.view(batch, seq, heads, head_dim).transpose(1, 2)


def _flex_mask(entries: Entries, see_earlier: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = entries[batch, query], entries[batch, key]
        # A padded query reads itself, so that its row is not empty.
        return visible(queries, keys, see_earlier=see_earlier) | ((queries.order == PADDING) & (query == key))

    if entries.position.device.type == "cpu" and torch.is_grad_enabled():
        raise UnsupportedError("FlexAttention has no backward pass on CPUs: train with execution='gathered'.")
    num_rows, num_entries = entries.order.shape
    return create_block_mask(reads, num_rows, None, num_entries, num_entries, device=str(entries.position.device))


class AttendHeld:
    """New entries are written behind what is held, and read it under the mask where one is needed.

    Args:
        chunk: the new entries.
        slots: extended here; what the chunk's events drop is still there while the chunk is computed.
        device: the model's.
        see_earlier: as in `visible`.
        pooled: folded spans are summarised by means, as `Combiner` says.
        sinks: with rotary positions counted inside the cache, as `StreamingLLM` says: how many first tokens, how many
            entries in all, and how the model turns its queries.
    """

    def __init__(
        self,
        chunk: Chunk,
        slots: EntrySlots,
        device: torch.device,
        *,
        see_earlier: bool = False,
        pooled: bool = False,
        sinks: tuple[int, int, Rotation] | None = None,
    ) -> None:
        entries = chunk.entries
        was_empty = slots.longest == 0
        self.slots = slots
        self.row, self.column = (entries.order != PADDING).nonzero(as_tuple=True)
        fields = {name: getattr(entries, name)[self.row, self.column] for name in slots.fields if name != "count"}
        if pooled:
            fields["count"] = torch.ones_like(self.row)
        self.slot = slots.extend_rows(self.row, fields)
        self.means: list[tuple[int, Tensor, int]] = []
        width = entries.order.shape[1]
        is_step = width == 1 and not chunk.has_events
        same_length = bool((slots.lengths == slots.longest).all())
        self.mask: Tensor | None = None
        self.sinks = None
        if same_length and not pooled and sinks is None and not chunk.has_events and (is_step or was_empty):
            self.num_keys = slots.longest
            return
        held = slots.held(chunk)
        # A new entry's span is in the chunk; it is stored nowhere.
        held.span[self.row, self.slot] = entries.span[self.row, self.column].to(held.span.dtype)
        if pooled:
            held = self._pool(chunk, held)
        self.num_keys = slots.longest
        mask = entries_mask(entries, held, see_earlier=see_earlier)
        mask &= slots.is_held().unsqueeze(1) | (entries.order == PADDING).unsqueeze(2)
        self.mask = mask.to(device)
        self.bias = None
        if pooled:
            self.bias = slots.field("count")[:, : self.num_keys].clamp(min=1).double().log().to(device)
        if sinks is not None:
            first_tokens, max_entries, turn = sinks
            offset = (entries.position.long() + 1 - max_entries).clamp(min=0).to(device)
            is_sink = (held.position < first_tokens).to(device)
            self.sinks = (turn, -offset, is_sink[:, None, None, :])

    def _pool(self, chunk: Chunk, held: Entries) -> Entries:
        """Adds an entry for each folded span behind the tokens."""
        assert chunk.span is not None or not chunk.has_events
        if not chunk.has_events:
            return held
        rows, fields = [], []
        for row in range(len(held.span)):
            for number in torch.unique(held.span[row]).tolist():
                if number < 0:
                    continue
                members = (held.span[row] == number).nonzero().squeeze(1)
                at = int(held.until[row, members[0]])
                rows.append((row, members))
                fields.append((int(held.position[row, members].max()), OPEN + 1, at + 1, FOREVER, len(members)))
        if not rows:
            return held
        columns = torch.tensor(fields).T
        row_index = torch.tensor([row for row, _ in rows])
        slot = self.slots.extend_rows(
            row_index, dict(zip(("position", "order", "since", "until", "count"), columns, strict=True))
        )
        self.means = [(row, members, place) for (row, members), place in zip(rows, slot.tolist(), strict=True)]
        longest = self.slots.longest
        span = F.pad(held.span, (0, longest - held.span.shape[1]), value=-1)
        position, order, since, until, _ = self.slots.entries[:, :, :longest]
        return Entries(position=position, order=order, span=span, since=since, until=until)

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
        slots = self.slots
        slots.write(layer, self.row, self.slot, key[self.row, :, self.column], value[self.row, :, self.column])
        for row, members, place in self.means:
            for held in (slots.keys[layer], slots.values[layer]):
                held[row, :, place] = held[row][:, members].mean(dim=1)
        keys, values = slots.keys[layer][:, :, : self.num_keys], slots.values[layer][:, :, : self.num_keys]
        if self.mask is None:
            return original(query, keys, values, None)
        mask = additive(self.mask, query)
        if self.bias is not None:
            mask = mask + self.bias.to(query.dtype)[:, None, None, :]
        if self.sinks is None:
            return original(query, keys, values, mask)
        turn, offset, is_sink = self.sinks
        groups = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        scores = torch.where(is_sink, turn(query, offset) @ keys.mT, query @ keys.mT) * scale + mask
        return scores.softmax(dim=-1) @ values

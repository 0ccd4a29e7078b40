"""Keys and values of several rows of unequal length: one padded tensor a layer, in blocks that are given back."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["RowSlots", "slots_bytes"]


def allotted(entries: int, block_entries: int) -> int:
    """Slots allotted for `entries` held: whole blocks, with one slot to spare for the token under way."""
    return -(-(entries + 1) // block_entries) * block_entries


def slots_bytes(
    num_fields: int,
    *,
    num_layers: int,
    num_rows: int,
    longest_row_entries: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_entries: int,
) -> int:
    """Bytes of slots between forward passes, block rounding included; what the tensors of `RowSlots` must measure."""
    slots = num_rows * allotted(longest_row_entries, block_entries)
    kv_bytes = 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
    return slots * (kv_bytes + num_fields * 4) + num_rows * 8


class RowSlots:
    """Entries of each row in the order they came, in slots 0 to `lengths[row]`, with named integer fields each.

    Rows share one tensor a layer, allotted in whole blocks for the longest row.
    """

    def __init__(
        self,
        fields: tuple[str, ...],
        *,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        block_entries: int,
    ) -> None:
        self.fields = fields
        self.block_entries = block_entries
        shape = (num_rows, num_kv_heads, allotted(0, block_entries), head_dim)
        # Zeroed, not empty: slots past a row's length are masked, but 0 times not-a-number is not 0.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.entries = torch.zeros(len(fields), num_rows, shape[2], dtype=torch.int32)
        self.lengths = torch.zeros(num_rows, dtype=torch.long)

    @property
    def capacity(self) -> int:
        """Slots allotted to each row."""
        return self.entries.shape[2]

    @property
    def longest(self) -> int:
        """Entries of the longest row."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def tensors(self) -> list[Tensor]:
        """Everything held, for byte accounting."""
        return [*self.keys, *self.values, self.entries, self.lengths]

    def field(self, name: str) -> Int[Tensor, "rows slots"]:
        """One field of all slots, as a view: writing to it changes what is known of the entries."""
        return self.entries[self.fields.index(name)]

    def extend_rows(self, row: Int[Tensor, " new"], values: dict[str, Int[Tensor, " new"]]) -> Int[Tensor, " new"]:
        """Makes room behind each row's entries; returns the slot of each new entry, for `write`.

        Args:
            row: each new entry's row, never decreasing.
            values: every field of the new entries.
        """
        index = torch.arange(len(row))
        is_first = torch.ones(len(row), dtype=torch.bool)
        is_first[1:] = row[1:] != row[:-1]
        row_start = torch.cummax(torch.where(is_first, index, 0), dim=0).values
        slot = self.lengths[row] + index - row_start
        self.lengths = self.lengths.index_add(0, row, torch.ones_like(slot))
        capacity = allotted(max(self.longest - 1, 0), self.block_entries)
        if capacity > self.capacity:
            self._resize(capacity)
        for number, name in enumerate(self.fields):
            self.entries[number, row, slot] = values[name].to(torch.int32)
        return slot

    def write(
        self,
        layer: int,
        row: Int[Tensor, " tokens"],
        slot: Int[Tensor, " tokens"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
    ) -> None:
        """Stores one layer's keys and values in the slots that `extend_rows` gave."""
        self.keys[layer][row, :, slot] = key
        self.values[layer][row, :, slot] = value

    def keep(self, kept: Bool[Tensor, "rows longest"]) -> None:
        """Drops all other entries, and gives back blocks no longer needed; the kept stay in order."""
        longest = kept.shape[1]
        kept = kept & (torch.arange(longest) < self.lengths[:, None])
        lengths = kept.sum(dim=1)
        misplaced = kept & (torch.arange(longest) >= lengths[:, None])
        if bool(misplaced.any()):
            # Kept entries move down in order; the slots before the first gap of any row stay where they are.
            first_gap = int((~kept).long().argmax(dim=1)[misplaced.any(dim=1)].min())
            source = torch.argsort((~kept).to(torch.int8), dim=1, stable=True)[:, first_gap : int(lengths.max())]
            self._move(source, first_gap)
        self.lengths = lengths
        self.fit()

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in that order, in storage of their own; a row may be named more than once."""
        on_device = rows.to(self.keys[0].device) if self.keys else rows
        self.keys = [key.index_select(0, on_device) for key in self.keys]
        self.values = [value.index_select(0, on_device) for value in self.values]
        self.entries = self.entries.index_select(1, rows)
        self.lengths = self.lengths[rows]
        self.fit()

    def fit(self) -> None:
        """Allots exactly the blocks that the entries need."""
        capacity = allotted(self.longest, self.block_entries)
        if capacity != self.capacity:
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        shared = min(capacity, self.capacity)

        def resized(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = capacity
            new = tensor.new_zeros(shape)
            new.narrow(dim, 0, shared).copy_(tensor.narrow(dim, 0, shared))
            return new

        for layer in range(len(self.keys)):
            self.keys[layer] = resized(self.keys[layer], 2)
            self.values[layer] = resized(self.values[layer], 2)
        self.entries = resized(self.entries, 2)

    def _move(self, source: Int[Tensor, "rows moved"], first: int) -> None:
        last = first + source.shape[1]
        self.entries[:, :, first:last] = self.entries.gather(2, source.expand(len(self.fields), -1, -1))
        on_device = source.to(self.keys[0].device) if self.keys else source
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                index = on_device[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
                tensor[:, :, first:last] = tensor.gather(2, index)

"""Keys and values of several rows of unequal length: one padded tensor a layer, in blocks that are given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.cache.shape import KVShape

__all__ = ["RowSlots", "slots_bytes"]


def allotted(entries: int, block_entries: int, block_growth: int = 1) -> int:
    """Slots allotted for `entries` held: whole blocks, with one slot to spare for the token under way.

    Blocks double with the cache, up to `block_growth` times and an eighth of it: the larger it is, the more it costs to
    copy when an open sentence crosses a block.
    """
    block = block_entries
    while block < block_entries * block_growth and entries >= 16 * block:
        block *= 2
    return -(-(entries + 1) // block) * block


def slots_bytes(
    num_fields: int, longest_row_entries: int, shape: KVShape, *, block_entries: int, block_growth: int = 1
) -> int:
    """Bytes of slots between forward passes, block rounding included; what the tensors of `RowSlots` must measure."""
    slots = shape.num_rows * allotted(longest_row_entries, block_entries, block_growth)
    return slots * (shape.entry_bytes + num_fields * 4) + shape.num_rows * 8


class RowSlots:
    """Entries of each row, in slots 0 to `lengths[row]` in any order, with named integer fields each.

    Rows share one tensor a layer, on its device, allotted in whole blocks for the longest row, and for
    `reserve_entries` at least.
    """

    def __init__(
        self,
        fields: tuple[str, ...],
        shape: KVShape,
        devices: Sequence[torch.device],
        *,
        block_entries: int,
        block_growth: int = 1,
    ) -> None:
        self.fields = fields
        self.block_entries = block_entries
        self.block_growth = block_growth
        self.reserve_entries = 0
        sizes = (shape.num_rows, shape.num_kv_heads, allotted(0, block_entries), shape.head_dim)
        # Zeroed, not empty: slots past a row's length are masked, but 0 times not-a-number is not 0.
        self.keys = [torch.zeros(sizes, dtype=shape.dtype, device=device) for device in devices]
        self.values = [torch.zeros(sizes, dtype=shape.dtype, device=device) for device in devices]
        self.entries = torch.zeros(len(fields), shape.num_rows, sizes[2], dtype=torch.int32)
        self.lengths = torch.zeros(shape.num_rows, dtype=torch.long)

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
        num_rows = len(self.lengths)
        if len(row) == num_rows and (num_rows == 1 or bool((row == torch.arange(num_rows)).all())):
            # One entry a row: the decode step. Same answer as below, without the running sums.
            slot = self.lengths
            self.lengths = slot + 1
        else:
            slot = self._slots_behind(row)
        capacity = allotted(max(self.longest - 1, 0), self.block_entries, self.block_growth)
        if capacity > self.capacity:
            self._resize(capacity)
        self.entries[:, row, slot] = torch.stack([values[name] for name in self.fields]).to(torch.int32)
        return slot

    def _slots_behind(self, row: Int[Tensor, " new"]) -> Int[Tensor, " new"]:
        index = torch.arange(len(row))
        is_first = torch.ones(len(row), dtype=torch.bool)
        is_first[1:] = row[1:] != row[:-1]
        row_start = torch.cummax(torch.where(is_first, index, 0), dim=0).values
        slot = self.lengths[row] + index - row_start
        self.lengths = self.lengths.index_add(0, row, torch.ones_like(slot))
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
        """Drops all other entries, and gives back blocks no longer needed.

        The last kept entries move into the gaps, so that the cost is that of what was dropped, not of what is held;
        order tells nothing, fields do.
        """
        longest = kept.shape[1]
        column = torch.arange(longest)
        kept = kept & (column < self.lengths[:, None])
        lengths = kept.sum(dim=1)
        inside = column < lengths[:, None]
        # As many gaps before a row's new length as kept entries behind it, and both come row by row.
        gap_row, gap = (~kept & inside).nonzero(as_tuple=True)
        _, moved = (kept & ~inside).nonzero(as_tuple=True)
        if len(gap):
            self._move(gap_row, moved, gap)
        self.lengths = lengths
        self.fit()

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in that order, in storage of their own; a row may be named more than once."""
        self.keys = [key.index_select(0, rows.to(key.device)) for key in self.keys]
        self.values = [value.index_select(0, rows.to(value.device)) for value in self.values]
        self.entries = self.entries.index_select(1, rows)
        self.lengths = self.lengths[rows]
        self.fit()

    def join(self, other: RowSlots) -> None:
        """Adds another's rows behind these; it has the same layers, heads and fields."""
        self.reserve_entries = max(self.reserve_entries, other.reserve_entries)
        longest = max(self.longest, other.longest, self.reserve_entries)
        capacity = allotted(longest, self.block_entries, self.block_growth)
        for slots in (self, other):
            if slots.capacity != capacity:
                slots._resize(capacity)
        self.keys = [torch.cat(pair) for pair in zip(self.keys, other.keys, strict=True)]
        self.values = [torch.cat(pair) for pair in zip(self.values, other.values, strict=True)]
        self.entries = torch.cat([self.entries, other.entries], dim=1)
        self.lengths = torch.cat([self.lengths, other.lengths])

    def saved(self) -> dict[str, Tensor]:
        """What is held, by name and without the unused parts of blocks; for `restore_saved`."""
        longest = self.longest
        saved = {"entries": self.entries[:, :, :longest].clone(), "lengths": self.lengths.clone()}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            saved |= {f"keys.{layer}": key[:, :, :longest].clone(), f"values.{layer}": value[:, :, :longest].clone()}
        return saved

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave, of as many rows, layers and heads.

        Raises:
            KeyError, ValueError: something is missing, or of another shape.
        """
        lengths, entries = saved["lengths"].cpu(), saved["entries"].cpu()
        longest = entries.shape[2]
        if lengths.shape != self.lengths.shape or int(lengths.max()) != longest or int(lengths.min()) < 0:
            raise ValueError(f"lengths {lengths.tolist()} for entries of {tuple(entries.shape)}")
        if entries.shape[:2] != self.entries.shape[:2]:
            raise ValueError(f"entries of {tuple(entries.shape)}, not {tuple(self.entries.shape)}")
        self.lengths = lengths
        self.fit()
        self.entries[:, :, :longest] = entries
        for layer in range(len(self.keys)):
            for name, mine in (("keys", self.keys[layer]), ("values", self.values[layer])):
                found = saved[f"{name}.{layer}"]
                shape = (*mine.shape[:2], longest, mine.shape[3])
                if found.shape != shape or found.dtype != mine.dtype:
                    raise ValueError(f"{name}.{layer} is {found.dtype} {tuple(found.shape)}, not {mine.dtype} {shape}")
                mine[:, :, :longest].copy_(found)

    def fit(self) -> None:
        """Allots exactly the blocks that the entries, or the reserve, need."""
        capacity = allotted(max(self.longest, self.reserve_entries), self.block_entries, self.block_growth)
        if capacity != self.capacity:
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        shared = min(capacity, self.capacity)

        def resized(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = capacity
            new = tensor.new_empty(shape)
            new.narrow(dim, 0, shared).copy_(tensor.narrow(dim, 0, shared))
            new.narrow(dim, shared, capacity - shared).zero_()  # see __init__
            return new

        for layer in range(len(self.keys)):
            self.keys[layer] = resized(self.keys[layer], 2)
            self.values[layer] = resized(self.values[layer], 2)
        self.entries = resized(self.entries, 2)

    def _move(self, row: Int[Tensor, " moved"], source: Int[Tensor, " moved"], target: Int[Tensor, " moved"]) -> None:
        self.entries[:, row, target] = self.entries[:, row, source]
        for tensor in (*self.keys, *self.values):
            row, source, target = row.to(tensor.device), source.to(tensor.device), target.to(tensor.device)
            tensor[row, :, target] = tensor[row, :, source]

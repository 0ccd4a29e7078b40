"""Keys and values of which each layer and key head holds other tokens: one tensor of slots a layer, with what is known.

Rows, layers and heads differ in what they hold; heads of one layer and row don't differ in how much.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thoughtformer.cache.blocks import Blocks
from thoughtformer.cache.entries import BLOCK_ENTRIES, Store
from thoughtformer.cache.shape import KVShape
from thoughtformer.rules.schedule import RowReading

__all__ = ["HeadStore", "Replayed", "head_store_bytes"]


class Replayed(Protocol):
    """A pass that can be made again over less."""

    def again(self, next_position: Int[Tensor, " rows"]) -> None:
        """Makes it again, as if it had been given each row's tokens before these positions alone."""
        ...


def _num_slots(longest: int, most: int) -> int:
    step = BLOCK_ENTRIES // 4 if longest <= 4 * BLOCK_ENTRIES else BLOCK_ENTRIES
    return min(-(-max(longest, 1) // step) * step, most)


def head_store_bytes(
    most_entries: Sequence[int],
    longest_row_entries: int,
    shape: KVShape,
    *,
    slot_numbers: int = 1,
    state_numbers: int = 0,
) -> int:
    """What the tensors of a `HeadStore` must measure, with so many numbers a slot, and a row in a layer."""
    exact = torch.promote_types(shape.dtype, torch.float32).itemsize
    slots = sum(_num_slots(longest_row_entries, most) for most in most_entries)
    in_slots = shape.num_kv_heads * slots * (shape.head_bytes + slot_numbers * exact + 4)
    return shape.num_rows * (in_slots + shape.num_layers * state_numbers * exact + 8)


class HeadStore(Store):
    """Keys and values by layer, row, head and slot, with each slot's position (-1: empty) and numbers of its method's.

    A row's entries are in its first slots, in any order. While it waits, it remembers passes instead of what they
    dropped: to take some of them back, it goes back to the mark and makes them again.

    Args:
        most_entries: slots that each layer may come to.
        shape: of its keys and values.
        devices: of each layer.
        numbers: names of what a method knows of an entry.
        state: what a method knows of a row in a layer beside that: names, and shapes without rows.
        tiers: what holds older entries.
    """

    can_wait = True

    def __init__(
        self,
        most_entries: Sequence[int],
        shape: KVShape,
        devices: Sequence[torch.device],
        *,
        numbers: Sequence[str] = ("attention",),
        state: Mapping[str, Sequence[int]] | None = None,
        tiers: Sequence[Blocks] = (),
    ) -> None:
        assert len(most_entries) == shape.num_layers
        num_rows = shape.num_rows
        self.most_entries = list(most_entries)
        #: Entries of each row in its slots, in the layer that holds most.
        self.raw_lengths = torch.zeros(num_rows, dtype=torch.long)
        #: Passes since the last commit.
        self.passes: list[Replayed] = []
        exact = torch.promote_types(shape.dtype, torch.float32)
        kinds: dict[str, tuple[Sequence[int], torch.dtype]] = {
            "keys": ((shape.head_dim,), shape.dtype),
            "values": ((shape.head_dim,), shape.dtype),
            **dict.fromkeys(numbers, ((), exact)),
            "position": ((), torch.int32),
        }
        #: What is held in slots.
        self.in_slots = tuple(kinds)
        self.held: dict[str, list[Tensor]] = {}
        for name, (tail, kind) in kinds.items():
            sizes = [(num_rows, shape.num_kv_heads, _num_slots(0, most), *tail) for most in most_entries]
            self.held[name] = [
                torch.full(size, _EMPTY.get(name, 0), dtype=kind, device=device)
                for size, device in zip(sizes, devices, strict=True)
            ]
        for name, tail in (state or {}).items():
            self.held[name] = [torch.zeros(num_rows, *tail, dtype=exact, device=device) for device in devices]
        self.tiers = list(tiers)

    @property
    def lengths(self) -> Int[Tensor, " rows"]:  # type: ignore[override]  an attribute of stores of one part
        return sum((tier.lengths for tier in self.tiers), self.raw_lengths)

    def lengths_by_part(self) -> list[Int[Tensor, " rows"]]:
        return [self.raw_lengths, *(tier.lengths for tier in self.tiers)]

    def __getitem__(self, name: str) -> list[Tensor]:
        """What is held under a name, by layer."""
        return self.held[name]

    def entries(
        self, layer: int
    ) -> tuple[
        Float[Tensor, "rows kv_heads entries head_dim"],
        Float[Tensor, "rows kv_heads entries head_dim"],
        Int[Tensor, "rows kv_heads entries"],
    ]:
        """Keys, values and positions of all that a layer holds, slots last; -1 where there is no entry."""
        raw = self.held["keys"][layer], self.held["values"][layer], self.held["position"][layer]
        parts = [*(tier.entries(layer) for tier in self.tiers), raw]
        if len(parts) == 1:
            return raw
        keys, values, positions = (torch.cat(of_all, dim=2) for of_all in zip(*parts, strict=True))
        return keys, values, positions

    def counts_in(self, layer: int) -> Int[Tensor, " rows"]:
        """Entries that each head of a row holds in the slots of a layer."""
        return (self.held["position"][layer][:, 0] >= 0).sum(dim=1)

    def tensors(self) -> list[Tensor]:
        parts = [*self.held.values(), *(tier.tensors() for tier in self.tiers), [self.raw_lengths]]
        return [tensor for tensors in parts for tensor in tensors]

    def make_room(self, longest: int) -> None:
        """Allots slots for a row of so many entries, in blocks; what lies behind them is lost."""
        for name in self.in_slots:
            for layer, most in enumerate(self.most_entries):
                tensor, slots = self.held[name][layer], _num_slots(longest, most)
                more = slots - tensor.shape[2]
                if more > 0:
                    filling = tensor.new_full((*tensor.shape[:2], more, *tensor.shape[3:]), _EMPTY.get(name, 0))
                    self.held[name][layer] = torch.cat([tensor, filling], dim=2)
                elif more:
                    self.held[name][layer] = tensor[:, :, :slots].clone()

    def fit(self) -> None:
        """Allots exactly the blocks that the longest row needs."""
        self.make_room(int(self.raw_lengths.max()) if len(self.raw_lengths) else 0)

    def keep(self, layer: int, row: int, slots: Int[Tensor, "kv_heads kept"]) -> None:
        """Of a row in a layer, holds these slots of each head alone, in this order."""
        kept = slots.shape[1]
        for name in self.in_slots:
            held = self.held[name][layer][row]
            index = slots.view(*slots.shape, *[1] * (held.dim() - 2)).expand(*slots.shape, *held.shape[2:])
            held[:, :kept] = held.gather(1, index)
            held[:, kept:] = _EMPTY.get(name, 0)

    def move_to(self, blocks: Blocks, layer: int, row: int, first: int) -> None:
        """Moves a block out of a row's slots: those that follow the `first` ones."""
        count, end = int(self.counts_in(layer)[row]), first + blocks.block_entries
        keys, values, position = (self.held[name][layer][row, :, first:end] for name in ("keys", "values", "position"))
        blocks.append(layer, row, keys, values, position)
        slots = torch.cat([torch.arange(first), torch.arange(end, count)]).to(keys.device)
        self.keep(layer, row, slots.expand(len(keys), -1))

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        self.held = {
            name: [tensor.index_select(0, rows.to(tensor.device)) for tensor in tensors]
            for name, tensors in self.held.items()
        }
        self.raw_lengths = self.raw_lengths[rows]
        self.fit()
        for tier in self.tiers:
            tier.select(rows)

    def fork_rows(self, rows: Int[Tensor, " selected"]) -> HeadStore:
        copied = copy.copy(self)
        copied.passes = []
        copied.tiers = [copy.copy(tier) for tier in self.tiers]
        copied.select(rows)  # makes new tensors of all
        return copied

    def join(self, other: HeadStore) -> None:
        longest = max(int(self.raw_lengths.max()), int(other.raw_lengths.max()))
        for store in (self, other):
            store.make_room(longest)
        for name, tensors in self.held.items():
            self.held[name] = [torch.cat(pair) for pair in zip(tensors, other.held[name], strict=True)]
        self.raw_lengths = torch.cat([self.raw_lengths, other.raw_lengths])
        for tier, others in zip(self.tiers, other.tiers, strict=True):
            tier.join(others)

    def clear(self) -> None:
        self.raw_lengths = torch.zeros_like(self.raw_lengths)
        for name, tensors in self.held.items():
            for tensor in tensors:
                tensor.fill_(_EMPTY.get(name, 0))
        self.passes = []
        self.fit()
        for tier in self.tiers:
            tier.clear()

    def saved(self) -> dict[str, Tensor]:
        saved = {"lengths": self.raw_lengths} | {
            f"{name}.{layer}": tensor.clone()
            for name, tensors in self.held.items()
            for layer, tensor in enumerate(tensors)
        }
        for number, tier in enumerate(self.tiers):
            saved |= {f"tier.{number}.{name}": tensor for name, tensor in tier.saved().items()}
        return saved

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        lengths = saved["lengths"].cpu()
        if (
            lengths.shape != self.raw_lengths.shape
            or int(lengths.min()) < 0
            or int(lengths.max()) > max(self.most_entries)
        ):
            raise ValueError(f"lengths {lengths.tolist()}")
        self.raw_lengths = lengths
        self.fit()
        for name, tensors in self.held.items():
            for layer, tensor in enumerate(tensors):
                found = saved[f"{name}.{layer}"]
                if found.shape != tensor.shape or found.dtype != tensor.dtype:
                    raise ValueError(f"{name}.{layer} is {found.dtype} of {tuple(found.shape)}")
                tensor.copy_(found)
        for number, tier in enumerate(self.tiers):
            start = f"tier.{number}."
            tier.restore_saved({name.removeprefix(start): saved[name] for name in saved if name.startswith(start)})

    def snapshot(self, *, whole: bool) -> HeadStore | None:
        """A copy before several passes, or where some may be taken back; before one nothing: a full store overwrites
        what it drops, and copying it at every step would double what it costs."""
        if not (whole or self.waits):
            return None
        copied = self.mark()
        copied.passes = self.passes.copy()
        return copied

    def restored(self, snapshot: HeadStore) -> HeadStore:
        # Passes write to this very store.
        self.back_to(snapshot)
        self.passes = snapshot.passes
        return self

    def mark(self) -> HeadStore:
        return self.fork_rows(torch.arange(len(self.raw_lengths)))

    def back_to(self, mark: HeadStore) -> None:
        self.held, self.raw_lengths, self.tiers, self.passes = mark.held, mark.raw_lengths, mark.tiers, []

    def commit(self, next_position: Int[Tensor, " rows"]) -> None:
        self.passes = []

    def commit_first(self, mark: HeadStore, readings: Sequence[RowReading]) -> None:
        passes = self.passes
        self.back_to(mark)
        next_position = torch.tensor([reading.first_position + len(reading.ids) for reading in readings])
        for each in passes:
            each.again(next_position)

    def check_positions(self, row: int, num_tokens: int) -> None:
        counts = torch.stack([self.counts_in(layer)[row].cpu() for layer in range(len(self.most_entries))])
        if int(counts.max()) != int(self.raw_lengths[row]):
            raise ValueError(f"its slots hold {counts.tolist()} entries by layer, not {int(self.raw_lengths[row])}")
        for layer, slots in enumerate(self.held["position"]):
            count = int(self.counts_in(layer)[row])
            held = self.entries(layer)[2][row].sort(dim=1).values
            is_wrong = ((held.diff(dim=1) <= 0) & (held[:, 1:] >= 0)).any() | (held >= num_tokens).any()
            if bool(is_wrong | (slots[row, :, :count] < 0).any() | (slots[row, :, count:] != -1).any()):
                raise ValueError("its entries are of positions that its text doesn't have")


_EMPTY = {"position": -1}

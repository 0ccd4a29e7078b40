"""Entries in fewer bits of which the highest bits of keys are at hand: enough to tell which of them a query wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, allotted_blocks
from thoughtformer.cache.quantised import Codes, QuantisedBlocks, dequantised, packed, sizes, unpacked
from thoughtformer.cache.shape import KVShape

__all__ = ["LookupBlocks", "lookup_bytes"]

#: What is an entry's own.
ENTRIES = ("key_codes", "value_codes", "value_step", "value_zero")
#: Steps of a nat in which shares are told apart.
GRID = 2**13


class LookupBlocks(QuantisedBlocks):
    """Blocks in fewer bits, of whose keys the highest bit of each number is held apart: it finds them.

    Args:
        bits, block_entries, shape, devices: as for `QuantisedBlocks`.
        in_host_memory: entries lie there, wherever the model is; what finds them is with the model.
    """

    def __init__(
        self, bits: int, block_entries: int, shape: KVShape, devices: Sequence[torch.device], *, in_host_memory: bool
    ) -> None:
        super().__init__(bits, block_entries, shape, devices)
        high = (shape.num_kv_heads, block_entries, -(-shape.head_dim // 8))
        # Like the keys' steps they are bytes, and with the model.
        self.held["key_high"] = [steps.new_zeros(len(steps), 0, *high) for steps in self.held["key_step"]]
        if in_host_memory:
            self.to_host(ENTRIES)

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        coded = self.coded(keys, values)
        high = unpacked(coded["key_codes"], self.bits) >> self.bits - 1
        coded["key_high"] = packed(torch.nn.functional.pad(high, (0, -high.shape[-1] % 8)), 1)
        self.put(layer, row, positions, coded)

    def scores(
        self, layer: int, queries: Float[Tensor, "rows kv_heads groups seq head_dim"], scale: float
    ) -> Float[Tensor, "rows kv_heads seq entries"]:
        """How much of each entry a query would read by the highest bits, the most of all query heads of a key head: the
        logarithm of its share among the row's entries, rounded; minus infinity where there is none."""
        step, zero, high = (self.held[f"key_{name}"][layer] for name in ("step", "zero", "high"))
        exact, half = torch.promote_types(queries.dtype, torch.float32), 2 ** (self.bits - 1)
        # Of the numbers of a half, the one in its middle.
        levels = zero + half * unpacked(high, 1)[..., : queries.shape[-1]] + (half - 1) / 2
        keys = (levels.to(exact) * sizes(step, exact)).transpose(1, 2).flatten(2, 3)
        is_there = self.is_there(layer).to(keys.device).repeat_interleave(self.block_entries, dim=1)
        is_there = is_there[:, None, None, None]
        scores = (queries.to(exact) @ keys[:, :, None].mT) * scale
        shares = scores.masked_fill(~is_there, float("-inf")).log_softmax(dim=-1)
        # Keys alike in all bits are equal, however their products were rounded.
        shares = (shares * GRID).round() / GRID
        return shares.masked_fill(~is_there, float("-inf")).amax(dim=2)

    def some(self, layer: int, chosen: Int[Tensor, "rows kv_heads chosen"]) -> BlockEntries:
        """Keys, values and positions of some entries of each head, by their place in the row's blocks."""
        place = torch.arange(chosen.shape[0])[:, None, None], torch.arange(chosen.shape[1])[None, :, None]

        def of(held: Tensor, *, of_block: bool = False) -> Tensor:
            row, head, at = (index.to(held.device) for index in (*place, chosen))
            within = torch.zeros_like(at) if of_block else at % self.block_entries
            return held[row, at // self.block_entries, head, within].to(chosen.device)

        def codes(kind: str) -> Codes:
            by_channel = kind == "key"
            held = {name: self.held[f"{kind}_{name}"][layer] for name in Codes._fields}
            return Codes(*(of(held[name], of_block=by_channel and name != "codes") for name in Codes._fields))

        keys, values = (dequantised(codes(kind), self.bits, self.dtype) for kind in ("key", "value"))
        return keys, values.flatten(3), of(self.positions(layer))


def lookup_bytes(block_entries: int, longest_row_entries: int, shape: KVShape) -> int:
    """What the tensors of `LookupBlocks` must measure beside those of `QuantisedBlocks`."""
    block = shape.num_kv_heads * block_entries * -(-shape.head_dim // 8)
    return shape.num_layers * shape.num_rows * allotted_blocks(longest_row_entries // block_entries) * block

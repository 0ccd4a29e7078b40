"""Entries in fewer bits whose keys are known by one more bit a channel: enough to tell which of them a query wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, allotted_blocks
from thoughtformer.cache.quantised import Codes, QuantisedBlocks, dequantised

__all__ = ["LookupBlocks", "lookup_bytes"]


#: What is an entry's own.
ENTRIES = ("key_codes", "value_codes", "value_step", "value_zero")


#: Steps of a nat in which shares are told apart.
GRID = 2**13


class LookupBlocks(QuantisedBlocks):
    """Blocks in fewer bits, and for each channel of a block's keys their mean, and whether a key is above or below it.

    A key counts as its channel's mean, plus or minus how far the block's keys lie from it on average: that is the best
    that one bit can do.

    Args:
        bits, block_entries: as for `QuantisedBlocks`.
        in_host_memory: entries lie there, wherever the model is; what finds them is with the model.
    """

    def __init__(
        self,
        bits: int,
        block_entries: int,
        *,
        in_host_memory: bool,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
    ) -> None:
        super().__init__(
            bits,
            block_entries,
            num_layers=num_layers,
            num_rows=num_rows,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )
        devices = [device] * num_layers if isinstance(device, torch.device) else device
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "sides": ((num_kv_heads, block_entries, -(-head_dim // 8)), torch.uint8),
            "means": ((num_kv_heads, 1, head_dim), dtype),
            "spreads": ((num_kv_heads, 1, head_dim), dtype),
        }
        for name in ENTRIES if in_host_memory else ():
            self.held[name] = [tensor.cpu() for tensor in self.held[name]]
        for name, (shape, kind) in shapes.items():
            self.held[name] = [torch.zeros(num_rows, 0, *shape, dtype=kind, device=place) for place in devices]

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        means = keys.mean(dim=1, keepdim=True)
        spreads = (keys - means).abs().mean(dim=1, keepdim=True)
        # Eight channels to a byte; those that are missing from the last are below.
        above = torch.nn.functional.pad((keys >= means).to(torch.uint8), (0, -keys.shape[2] % 8))
        sides = torch.stack([above[..., bit::8] << bit for bit in range(8)]).sum(dim=0, dtype=torch.uint8)
        found = {"sides": sides, "means": means, "spreads": spreads}
        self.put(layer, row, positions, {**self.coded(keys, values), **found})

    def scores(
        self, layer: int, queries: Float[Tensor, "rows kv_heads groups seq head_dim"], scale: float
    ) -> Float[Tensor, "rows kv_heads seq entries"]:
        """How much of each entry a query would read by its one bit, the most of all query heads of a key head: the
        logarithm of its share among the row's entries, rounded; minus infinity where there is none."""
        sides, means, spreads = (self.held[name][layer] for name in ("sides", "means", "spreads"))
        bits = torch.stack([sides >> bit & 1 for bit in range(8)], dim=-1).flatten(-2)[..., : means.shape[-1]]
        keys = means + spreads * (2 * bits.to(means.dtype) - 1)
        keys = keys.transpose(1, 2).flatten(2, 3)
        is_there = self.is_there(layer).to(keys.device).repeat_interleave(self.block_entries, dim=1)
        is_there = is_there[:, None, None, None]
        scores = (queries @ keys[:, :, None].mT).to(torch.promote_types(queries.dtype, torch.float32)) * scale
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


def lookup_bytes(
    block_entries: int,
    *,
    longest_row_entries: int,
    num_layers: int,
    num_rows: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """What the tensors of `LookupBlocks` must measure beside those of `QuantisedBlocks`."""
    block = num_kv_heads * (block_entries * -(-head_dim // 8) + 2 * head_dim * dtype.itemsize)
    return num_layers * num_rows * allotted_blocks(longest_row_entries // block_entries) * block

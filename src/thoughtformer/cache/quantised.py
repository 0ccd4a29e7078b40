"""Entries in fewer bits: blocks of neighbours, keys scaled by channel and values by token (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, Blocks, allotted_blocks

__all__ = ["BITS", "Codes", "QuantisedBlocks", "dequantised", "quantised", "quantised_bytes"]

#: That a byte holds whole numbers of.
BITS = (8, 4, 2)
#: Numbers of a value that share a scale.
GROUP = 64


class Codes(NamedTuple):
    """Numbers from a lowest one in `2**bits - 1` steps; several to a byte, along the last axis."""

    codes: UInt8[Tensor, "*shape bytes"]
    step: Float[Tensor, "*scales"]
    lowest: Float[Tensor, "*scales"]


def quantised(states: Float[Tensor, "*shape"], bits: int, dim: int) -> Codes:
    """Each number as the nearest of `2**bits` steps between the smallest and the largest along `dim`."""
    exact = torch.promote_types(states.dtype, torch.float32)
    lowest, highest = states.amin(dim=dim, keepdim=True), states.amax(dim=dim, keepdim=True)
    step = ((highest.to(exact) - lowest) / (2**bits - 1)).to(states.dtype).clamp(min=torch.finfo(states.dtype).tiny)
    codes = ((states.to(exact) - lowest) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)
    parts = [codes[..., part :: 8 // bits] << (bits * part) for part in range(8 // bits)]
    return Codes(torch.stack(parts).sum(dim=0, dtype=torch.uint8), step, lowest)


def dequantised(numbers: Codes, bits: int) -> Float[Tensor, "*shape"]:
    """The steps that the codes are of."""
    mask = 2**bits - 1
    codes = torch.stack([numbers.codes >> (bits * part) & mask for part in range(8 // bits)], dim=-1).flatten(-2)
    return numbers.lowest + codes.to(numbers.step.dtype) * numbers.step


def _groups(head_dim: int) -> int:
    """How many groups a value's numbers fall into."""
    return head_dim // GROUP if head_dim % GROUP == 0 else 1


class QuantisedBlocks(Blocks):
    """Blocks in fewer bits.

    Args:
        bits: of a number.
        block_entries: of a block.
    """

    def __init__(
        self,
        bits: int,
        block_entries: int,
        *,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
    ) -> None:
        self.bits = bits
        groups, coded = _groups(head_dim), head_dim * bits // 8
        shapes = {
            "key_codes": ((num_kv_heads, block_entries, coded), torch.uint8),
            "key_scales": ((2, num_kv_heads, 1, head_dim), dtype),
            "value_codes": ((num_kv_heads, block_entries, groups, coded // groups), torch.uint8),
            "value_scales": ((2, num_kv_heads, block_entries, groups, 1), dtype),
            "positions": ((num_kv_heads, block_entries), torch.int32),
        }
        devices = [device] * num_layers if isinstance(device, torch.device) else device
        super().__init__(block_entries, shapes, num_rows=num_rows, devices=devices)

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        key = quantised(keys, self.bits, dim=1)
        value = quantised(values.unflatten(2, (_groups(values.shape[2]), -1)), self.bits, dim=3)
        block = {
            "key_codes": key.codes,
            "key_scales": torch.stack([key.step, key.lowest]),
            "value_codes": value.codes,
            "value_scales": torch.stack([value.step, value.lowest]),
            "positions": positions,
        }
        self.put(layer, row, block)

    def blocks(self, layer: int) -> BlockEntries:
        held = {name: tensors[layer] for name, tensors in self.held.items()}
        key_step, key_lowest = held["key_scales"].unbind(2)
        value_step, value_lowest = held["value_scales"].unbind(2)
        keys = dequantised(Codes(held["key_codes"], key_step, key_lowest), self.bits)
        values = dequantised(Codes(held["value_codes"], value_step, value_lowest), self.bits).flatten(4)
        return keys, values, held["positions"]


def quantised_bytes(
    bits: int,
    block_entries: int,
    *,
    longest_row_entries: int,
    num_layers: int,
    num_rows: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """What the tensors of `QuantisedBlocks` must measure."""
    codes = 2 * block_entries * num_kv_heads * head_dim * bits // 8
    scales = 2 * num_kv_heads * (head_dim + block_entries * _groups(head_dim)) * dtype.itemsize
    blocks = allotted_blocks(longest_row_entries // block_entries)
    return num_layers * num_rows * (blocks * (codes + scales + num_kv_heads * block_entries * 4) + 8)

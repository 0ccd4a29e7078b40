"""Entries in fewer bits: blocks of neighbours, keys scaled by channel and values by token (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, Blocks, allotted_blocks, positions_bytes
from thoughtformer.cache.shape import KVShape

__all__ = [
    "BITS",
    "Codes",
    "QuantisedBlocks",
    "dequantised",
    "entry_bits",
    "packed",
    "quantised",
    "quantised_bytes",
    "sizes",
    "unpacked",
]

#: That a byte holds whole numbers of.
BITS = (8, 4, 2)
#: Numbers of a value that share a scale.
GROUP = 64


class Codes(NamedTuple):
    """Numbers as whole steps: `zero` and `codes` together; several codes to a byte, along the last axis.

    A step is `2**(step / 8 - 20)`: from a millionth to four thousand, each a twelfth larger than the one before.
    """

    codes: UInt8[Tensor, "*shape bytes"]
    step: UInt8[Tensor, "*scales"]
    zero: Integer[Tensor, "*scales"]


STEPS_AN_OCTAVE, LEAST_STEP = 8, -20
#: What differs by less counts as equal, so that rounding decides nothing: numbers that had more bits lie on a grid,
#: often halfway between two steps of another.
EVEN = 1e-6
#: Channels of keys may lie far from zero; numbers of a value don't.
KEY_ZERO, VALUE_ZERO = torch.int16, torch.int8
#: That codes can be added to.
LARGEST_ZERO = {torch.int16: 2**15 - 2**8, torch.int8: 2**7 - 1}


def sizes(step: UInt8[Tensor, "*scales"], dtype: torch.dtype) -> Float[Tensor, "*scales"]:
    """Of steps."""
    return torch.exp2(step.to(dtype) / STEPS_AN_OCTAVE + LEAST_STEP)


def quantised(states: Float[Tensor, "*shape"], bits: int, dim: int, zero_kind: torch.dtype) -> Codes:
    """Each number as the nearest step, of which `2**bits - 1` reach from the smallest to the largest along `dim`.

    What lies further from zero than `zero_kind` can tell in such steps gets larger ones.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    lowest, highest = states.amin(dim=dim, keepdim=True), states.amax(dim=dim, keepdim=True)
    needed = torch.maximum((highest - lowest) / (2**bits - 1), lowest.abs() / LARGEST_ZERO[zero_kind])
    step = ((needed.log2() - LEAST_STEP) * STEPS_AN_OCTAVE - EVEN).ceil().clamp(0, 255).to(torch.uint8)
    size = sizes(step, states.dtype)
    zero = (lowest / size + EVEN).round()
    codes = ((states / size + EVEN).round() - zero).clamp(0, 2**bits - 1).to(torch.uint8)
    return Codes(packed(codes, bits), step, zero.to(zero_kind))


def packed(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "*bytes"]:
    """Several codes to a byte."""
    parts = [codes[..., part :: 8 // bits] << (bits * part) for part in range(8 // bits)]
    return torch.stack(parts).sum(dim=0, dtype=torch.uint8)


def unpacked(codes: UInt8[Tensor, "*bytes"], bits: int) -> UInt8[Tensor, "*shape"]:
    """A byte for each code."""
    parts = [codes >> (bits * part) & (2**bits - 1) for part in range(8 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def dequantised(numbers: Codes, bits: int, dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The numbers that the steps come to."""
    exact, codes = torch.promote_types(dtype, torch.float32), unpacked(numbers.codes, bits)
    return ((codes + numbers.zero).to(exact) * sizes(numbers.step, exact)).to(dtype)


def _groups(head_dim: int) -> int:
    """How many groups a value's numbers fall into."""
    return head_dim // GROUP if head_dim % GROUP == 0 else 1


def entry_bits(bits: int, head_dim: int) -> int:
    """Of an entry's own: codes, and the scales of its value."""
    return 2 * head_dim * bits + 8 * _groups(head_dim) * (1 + VALUE_ZERO.itemsize)


class QuantisedBlocks(Blocks):
    """Blocks in fewer bits.

    Args:
        bits: of a number.
        block_entries, shape, devices, is_span: as for all blocks.
    """

    def __init__(
        self,
        bits: int,
        block_entries: int,
        shape: KVShape,
        devices: Sequence[torch.device],
        *,
        is_span: bool = True,
    ) -> None:
        self.bits = bits
        self.dtype = shape.dtype
        heads, groups, coded = shape.num_kv_heads, _groups(shape.head_dim), shape.head_dim * bits // 8
        by_channel, by_token = (heads, 1, shape.head_dim), (heads, block_entries, groups, 1)
        contents = {
            "key_codes": ((heads, block_entries, coded), torch.uint8),
            "key_step": (by_channel, torch.uint8),
            "key_zero": (by_channel, KEY_ZERO),
            "value_codes": ((heads, block_entries, groups, coded // groups), torch.uint8),
            "value_step": (by_token, torch.uint8),
            "value_zero": (by_token, VALUE_ZERO),
        }
        super().__init__(block_entries, contents, shape, devices, is_span=is_span)

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.put(layer, row, positions, self.coded(keys, values))

    def coded(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """What is held of a block's."""
        key = quantised(keys, self.bits, 1, KEY_ZERO)
        value = quantised(values.unflatten(2, (_groups(values.shape[2]), -1)), self.bits, 3, VALUE_ZERO)
        block = {f"key_{name}": part for name, part in key._asdict().items()}
        return block | {f"value_{name}": part for name, part in value._asdict().items()}

    def blocks(self, layer: int) -> BlockEntries:
        place = self.held["positions"][layer].device  # parts may lie elsewhere
        key, value = (
            Codes(*(self.held[f"{kind}_{name}"][layer].to(place) for name in Codes._fields))
            for kind in ("key", "value")
        )
        keys, values = (dequantised(numbers, self.bits, self.dtype) for numbers in (key, value))
        return keys, values.flatten(4), self.positions(layer)


def quantised_bytes(
    bits: int, block_entries: int, longest_row_entries: int, shape: KVShape, *, is_span: bool = True
) -> int:
    """What the tensors of `QuantisedBlocks` must measure, whatever the type of what is raw."""
    entries = block_entries * shape.num_kv_heads * entry_bits(bits, shape.head_dim) // 8
    of_keys = shape.num_kv_heads * shape.head_dim * (1 + KEY_ZERO.itemsize)
    block = entries + of_keys + positions_bytes(block_entries, shape.num_kv_heads, is_span=is_span)
    blocks = allotted_blocks(longest_row_entries // block_entries)
    return shape.num_layers * shape.num_rows * (blocks * block + 8)

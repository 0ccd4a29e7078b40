"""Entries in fewer bits: blocks of neighbours, keys scaled by channel and values by token (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

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


class QuantisedBlocks:
    """Blocks of entries, all heads of a row and layer alike; a row's blocks are in the order of its text.

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
        self.bits, self.block_entries = bits, block_entries
        devices = [device] * num_layers if isinstance(device, torch.device) else device
        self.num_blocks = torch.zeros(num_layers, num_rows, dtype=torch.long)
        groups, coded = _groups(head_dim), head_dim * bits // 8
        # By block, then by head.
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "key_codes": ((num_kv_heads, block_entries, coded), torch.uint8),
            "key_scales": ((2, num_kv_heads, 1, head_dim), dtype),
            "value_codes": ((num_kv_heads, block_entries, groups, coded // groups), torch.uint8),
            "value_scales": ((2, num_kv_heads, block_entries, groups, 1), dtype),
            "positions": ((num_kv_heads, block_entries), torch.int32),
        }
        self.held = {
            name: [torch.zeros(num_rows, 0, *shape, dtype=kind, device=place) for place in devices]
            for name, (shape, kind) in shapes.items()
        }

    @property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Entries of each row."""
        return self.num_blocks[0] * self.block_entries

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        return [*(tensor for tensors in self.held.values() for tensor in tensors), self.num_blocks]

    def change(self, change: Any) -> None:
        """The same change to every tensor of a layer."""
        self.held = {name: [change(tensor) for tensor in tensors] for name, tensors in self.held.items()}

    def _fit(self, layer: int) -> None:
        """Room for the row with the most blocks in a layer, and no more."""
        longest = int(self.num_blocks[layer].max()) if self.num_blocks.shape[1] else 0
        for tensors in self.held.values():
            tensor = tensors[layer]
            more = longest - tensor.shape[1]
            if more > 0:
                new = tensor.new_zeros(tensor.shape[0], more, *tensor.shape[2:])
                tensors[layer] = torch.cat([tensor, new], dim=1)
            elif more:
                tensors[layer] = tensor[:, :longest].clone()

    def append(
        self,
        layer: int,
        row: int,
        keys: Float[Tensor, "kv_heads entries head_dim"],
        values: Float[Tensor, "kv_heads entries head_dim"],
        positions: Int[Tensor, "kv_heads entries"],
    ) -> None:
        """Adds a block behind a row's."""
        place = int(self.num_blocks[layer, row])
        self.num_blocks[layer, row] += 1
        self._fit(layer)
        key = quantised(keys, self.bits, dim=1)
        value = quantised(values.unflatten(2, (_groups(values.shape[2]), -1)), self.bits, dim=3)
        new = {
            "key_codes": key.codes,
            "key_scales": torch.stack([key.step, key.lowest]),
            "value_codes": value.codes,
            "value_scales": torch.stack([value.step, value.lowest]),
            "positions": positions,
        }
        for name, tensor in new.items():
            self.held[name][layer][row, place] = tensor.to(self.held[name][layer].dtype)

    def pop_first(
        self, layer: int, row: int
    ) -> tuple[
        Float[Tensor, "kv_heads entries head_dim"],
        Float[Tensor, "kv_heads entries head_dim"],
        Int[Tensor, "kv_heads entries"],
    ]:
        """Takes a row's oldest block out; gives its keys, values and positions."""
        keys, values, positions = (part[row, 0] for part in self._blocks(layer))
        for tensors in self.held.values():
            tensor = tensors[layer]
            tensor[row, :-1] = tensor[row, 1:].clone()
        self.num_blocks[layer, row] -= 1
        self._fit(layer)
        return keys, values, positions.clone()

    def _blocks(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (rows, blocks, heads, entries, head_dim), and positions (rows, blocks, heads, entries)."""
        held = {name: tensors[layer] for name, tensors in self.held.items()}
        key_step, key_lowest = held["key_scales"].unbind(2)
        value_step, value_lowest = held["value_scales"].unbind(2)
        keys = dequantised(Codes(held["key_codes"], key_step, key_lowest), self.bits)
        values = dequantised(Codes(held["value_codes"], value_step, value_lowest), self.bits).flatten(4)
        return keys, values, held["positions"]

    def read(
        self, layer: int
    ) -> tuple[
        Float[Tensor, "rows kv_heads entries head_dim"],
        Float[Tensor, "rows kv_heads entries head_dim"],
        Int[Tensor, "rows kv_heads entries"],
    ]:
        """Keys, values and positions of a layer; -1 where a row has no entry."""
        keys, values, positions = self._blocks(layer)
        is_there = torch.arange(positions.shape[1]) < self.num_blocks[layer, :, None]
        positions = positions.masked_fill(~is_there.to(positions.device)[:, :, None, None], -1)
        keys, values, positions = (part.transpose(1, 2).flatten(2, 3) for part in (keys, values, positions))
        return keys, values, positions

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in storage of their own."""
        self.change(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        self.num_blocks = self.num_blocks[:, rows]
        for layer in range(len(self.num_blocks)):
            self._fit(layer)

    def join(self, other: QuantisedBlocks) -> None:
        """Adds another's rows behind these."""
        mine, num_blocks = self.held, torch.cat([self.num_blocks, other.num_blocks], dim=1)
        for blocks in (self, other):
            num_rows = blocks.num_blocks.shape[1]
            blocks.num_blocks = num_blocks.amax(dim=1, keepdim=True).expand(-1, num_rows)
            for layer in range(len(num_blocks)):
                blocks._fit(layer)
        for name, tensors in mine.items():
            self.held[name] = [torch.cat(pair) for pair in zip(tensors, other.held[name], strict=True)]
        self.num_blocks = num_blocks

    def clear(self) -> None:
        """Forgets everything; the rows stay."""
        self.change(lambda tensor: tensor[:, :0].clone())
        self.num_blocks = torch.zeros_like(self.num_blocks)

    def saved(self) -> dict[str, Tensor]:
        """What is held, by name."""
        return {"num_blocks": self.num_blocks.clone()} | {
            f"{name}.{layer}": tensor.clone()
            for name, tensors in self.held.items()
            for layer, tensor in enumerate(tensors)
        }

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave; raises `KeyError` and `ValueError`."""
        num_blocks = saved["num_blocks"].cpu()
        if num_blocks.shape != self.num_blocks.shape or bool(
            (num_blocks < 0).any() | (num_blocks != num_blocks[0]).any()
        ):
            raise ValueError(f"numbers of blocks {num_blocks.tolist()}")
        self.num_blocks = num_blocks
        for name, tensors in self.held.items():
            for layer, tensor in enumerate(tensors):
                found = saved[f"{name}.{layer}"]
                shape = (tensor.shape[0], int(num_blocks[layer].max()), *tensor.shape[2:])
                if found.shape != shape or found.dtype != tensor.dtype:
                    raise ValueError(f"{name}.{layer} is {found.dtype} of {tuple(found.shape)}")
                tensors[layer] = found.to(tensor.device, copy=True)


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
    blocks = longest_row_entries // block_entries
    return num_layers * num_rows * (blocks * (codes + scales + num_kv_heads * block_entries * 4) + 8)

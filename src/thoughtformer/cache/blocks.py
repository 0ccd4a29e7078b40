"""Blocks of entries of a row and layer, all its heads alike: what older entries are held in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.cache.shape import KVShape

__all__ = ["BlockEntries", "Blocks", "allotted_blocks", "positions_bytes"]

#: Keys, values and positions of entries.
BlockEntries = tuple[
    Float[Tensor, "*shape entries head_dim"], Float[Tensor, "*shape entries head_dim"], Int[Tensor, "*shape entries"]
]


def positions_bytes(block_entries: int, num_kv_heads: int, *, is_span: bool) -> int:
    """Of a block's positions."""
    return 4 if is_span else 4 * num_kv_heads * block_entries


def allotted_blocks(num_blocks: int) -> int:
    """Blocks that there is room for: in steps of a 32nd, so that a growing text moves them less than it reads them."""
    step = 1 << max(num_blocks.bit_length() - 6, 0)
    return -(-num_blocks // step) * step


class Blocks(ABC):
    """Blocks of `block_entries` entries; a row's are in the order of its text.

    Args:
        block_entries: of a block.
        contents: what is held of a block beside its positions, by name: its shape and type.
        shape: of what goes in.
        devices: of each layer.
        is_span: a block's entries follow one another, so that its first position tells all; or each head has its own.
    """

    def __init__(
        self,
        block_entries: int,
        contents: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        shape: KVShape,
        devices: Sequence[torch.device],
        *,
        is_span: bool,
    ) -> None:
        self.block_entries = block_entries
        self.is_span = is_span
        self.num_kv_heads = shape.num_kv_heads
        self.num_blocks = torch.zeros(shape.num_layers, shape.num_rows, dtype=torch.long)
        of_positions = ((), torch.int32) if is_span else ((shape.num_kv_heads, block_entries), torch.int32)
        #: By layer: (rows, blocks, ...).
        self.held = {
            name: [torch.zeros(shape.num_rows, 0, *size, dtype=kind, device=device) for device in devices]
            for name, (size, kind) in {**contents, "positions": of_positions}.items()
        }

    @abstractmethod
    def append(
        self,
        layer: int,
        row: int,
        keys: Float[Tensor, "kv_heads entries head_dim"],
        values: Float[Tensor, "kv_heads entries head_dim"],
        positions: Int[Tensor, "kv_heads entries"],
    ) -> None:
        """Adds a block behind a row's."""

    @abstractmethod
    def blocks(self, layer: int) -> BlockEntries:
        """Keys and values (rows, blocks, heads, entries, head_dim), and positions, whether or not a row has them."""

    def positions(self, layer: int) -> Int[Tensor, "rows blocks kv_heads entries"]:
        """Of each block's entries, whether or not a row has it."""
        held = self.held["positions"][layer]
        if not self.is_span:
            return held
        places = held[:, :, None, None] + torch.arange(self.block_entries, dtype=held.dtype, device=held.device)
        return places.expand(-1, -1, self.num_kv_heads, -1)

    def to_host(self, names: Iterable[str]) -> None:
        """From now on holds these in the host's memory."""
        for name in names:
            self.held[name] = [tensor.cpu() for tensor in self.held[name]]

    def put(
        self, layer: int, row: int, positions: Int[Tensor, "kv_heads entries"], block: Mapping[str, Tensor]
    ) -> None:
        """Holds what is to be held of a block behind a row's others."""
        block = {**block, "positions": positions[0, 0] if self.is_span else positions}
        place = int(self.num_blocks[layer, row])
        self.num_blocks[layer, row] += 1
        self._fit(layer)
        for name, tensor in block.items():
            held = self.held[name][layer]
            held[row, place] = tensor.to(device=held.device, dtype=held.dtype)

    def pop_first(self, layer: int, row: int) -> BlockEntries:
        """Takes a row's oldest block out."""
        keys, values, positions = (part[row, 0].clone() for part in self.blocks(layer))
        for tensors in self.held.values():
            tensor = tensors[layer]
            tensor[row, :-1] = tensor[row, 1:].clone()
        self.num_blocks[layer, row] -= 1
        self._fit(layer)
        return keys, values, positions

    def is_there(self, layer: int) -> Bool[Tensor, "rows blocks"]:
        """Which blocks there are."""
        places = torch.arange(self.held["positions"][layer].shape[1])
        return places < self.num_blocks[layer, :, None]

    def entries(self, layer: int) -> BlockEntries:
        """Keys, values (rows, heads, entries, head_dim) and positions of a layer; -1 where a row has no entry."""
        keys, values, positions = self.blocks(layer)
        is_there = self.is_there(layer).to(positions.device)
        positions = positions.masked_fill(~is_there[:, :, None, None], -1)
        keys, values, positions = (part.transpose(1, 2).flatten(2, 3) for part in (keys, values, positions))
        return keys, values, positions

    @property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Entries of each row."""
        return self.num_blocks[0] * self.block_entries

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        return [*(tensor for tensors in self.held.values() for tensor in tensors), self.num_blocks]

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same change to every tensor of a layer."""
        self.held = {name: [change(tensor) for tensor in tensors] for name, tensors in self.held.items()}

    def _fit(self, layer: int) -> None:
        """Room for the row with the most blocks in a layer."""
        longest = allotted_blocks(int(self.num_blocks[layer].max())) if self.num_blocks.shape[1] else 0
        for tensors in self.held.values():
            tensor = tensors[layer]
            more = longest - tensor.shape[1]
            if more > 0:
                new = tensor.new_zeros(tensor.shape[0], more, *tensor.shape[2:])
                tensors[layer] = torch.cat([tensor, new], dim=1)
            elif more:
                tensors[layer] = tensor[:, :longest].clone()

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in storage of their own."""
        self._change(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        self.num_blocks = self.num_blocks[:, rows]
        for layer in range(len(self.num_blocks)):
            self._fit(layer)

    def join(self, other: Blocks) -> None:
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
        self._change(lambda tensor: tensor[:, :0].clone())
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
                shape = (tensor.shape[0], allotted_blocks(int(num_blocks[layer].max())), *tensor.shape[2:])
                if found.shape != shape or found.dtype != tensor.dtype:
                    raise ValueError(f"{name}.{layer} is {found.dtype} of {tuple(found.shape)}")
                tensors[layer] = found.to(tensor.device, copy=True)

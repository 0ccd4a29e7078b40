"""Entries looked up one by one: the highest bit of each number of a key tells which tokens a query wants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, Blocks
from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore
from thoughtformer.cache.lookup import LookupBlocks, lookup_bytes
from thoughtformer.cache.quantised import BITS, entry_bits, quantised_bytes
from thoughtformer.cache.shape import KVShape
from thoughtformer.checks import check_count
from thoughtformer.compression.choosing import AttendToChosen, Choosing
from thoughtformer.compression.method import LayersShape, PassAttention
from thoughtformer.compression.methods.quantised import Quantised, check_head
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError
from thoughtformer.models.backbone import Backbone
from thoughtformer.rules.schedule import Chunk

__all__ = ["Lookup"]


@dataclass(frozen=True, kw_only=True)
class Lookup(Choosing):
    """Drops nothing, holds blocks in `bits` a number, and reads of them the `read_tokens` that a query wants most.

    What a query wants is judged by the highest bit of each number of a key: in which half of what its channel spans in
    the block it lies. The shares of attention that follow, the largest of all query heads of a key head, choose tokens
    one by one. The entries may lie in the host's memory: with the model stay the bits that find them. Layers with a
    window hold their near tokens as `Quantised` does. After Double Sparsity and SparQ (arXiv 2408.07092, 2312.04985),
    which judge by some channels of keys, not by some bits.

    Args:
        bits: of a number: 8, 4 or 2.
        block_tokens: that share scales of keys.
        read_tokens, first_tokens, recent_tokens, in_host_memory: as in `Choosing`.
    """

    name = "lookup"
    bits: int = 4
    block_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block_tokens", self.block_tokens, 2)
        if self.bits not in BITS:
            raise ConfigError(f"bits={self.bits}: give one of {', '.join(map(str, BITS))}.")

    @property
    def every_tokens(self) -> int:
        return self.block_tokens

    @property
    def kind(self) -> str:
        return f"{self.bits} bits, looked up"

    def bound(self, shape: LayersShape) -> Lookup:
        check_head(self.bits, shape)
        return self

    def in_window(self, window: int) -> Quantised:
        like = Quantised(
            bits=self.bits,
            first_tokens=self.first_tokens,
            recent_tokens=min(self.recent_tokens, 16),
            block_tokens=self.block_tokens,
        )
        return like.in_window(window)

    def new_tier(self, shape: KVShape, devices: Sequence[torch.device]) -> Blocks:
        return LookupBlocks(self.bits, self.block_tokens, shape, devices, in_host_memory=self.in_host_memory)

    def tier_bytes(self, entries: int, shape: KVShape) -> int:
        held = quantised_bytes(self.bits, self.block_tokens, entries, shape)
        return held + lookup_bytes(self.block_tokens, entries, shape)

    def entry_bytes(self, shape: KVShape) -> int:
        # The scales of a block's keys stay with the model, and count as read, all of them.
        return shape.num_kv_heads * entry_bits(self.bits, shape.head_dim) // 8

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendToLookups(chunk, self, store)

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[Lookup]:
        recent = min(64, int(search.target) // 4)
        block = max(min(64, int(search.target) // 8), 2)
        yield search.crossing(
            lambda tokens: cls(read_tokens=tokens, block_tokens=block, recent_tokens=recent),
            range(search.num_tokens + 1),
        )


class AttendToLookups(AttendToChosen[Lookup]):
    """By the highest bits of their keys."""

    @property
    def blocks(self) -> LookupBlocks:
        """What is chosen from."""
        (blocks,) = self.store.tiers
        assert isinstance(blocks, LookupBlocks)
        return blocks

    def scores(self, layer: int, states: Tensor, scale: float) -> Tensor:
        return self.blocks.scores(layer, states, scale)

    def some(self, layer: int, best: Tensor) -> BlockEntries:
        return self.blocks.some(layer, best)

"""What methods share that hold all entries and let each query read those that it may want."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, Blocks, allotted_blocks
from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore, head_store_bytes
from thoughtformer.cache.shape import KVShape
from thoughtformer.checks import check_count
from thoughtformer.compression.by_head import ByHead
from thoughtformer.compression.in_pieces import AttendInPieces, Queries
from thoughtformer.models.backbone import Original
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["AttendToChosen", "Choosing"]

Kind = TypeVar("Kind", bound="Choosing")


@dataclass(frozen=True, kw_only=True)
class Choosing(ByHead):
    """All queries read the first and the recent tokens, and of all others `read_tokens` that each chooses.

    Args:
        read_tokens: that are chosen.
        first_tokens: that all queries read.
        recent_tokens: that they read at least.
        in_host_memory: what is chosen from lies there and is copied to the model as it is chosen.
    """

    computes_scores = False
    read_tokens: int = 256
    first_tokens: int = 4
    recent_tokens: int = 64
    in_host_memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("read_tokens", self.read_tokens, 0)
        check_count("first_tokens", self.first_tokens, 0)
        check_count("recent_tokens", self.recent_tokens, 0)

    @property
    @abstractmethod
    def every_tokens(self) -> int:
        """That leave the raw ones together."""

    @property
    def choice_tokens(self) -> int:
        """That are chosen together."""
        return 1

    @abstractmethod
    def new_tier(self, shape: KVShape, devices: Sequence[torch.device]) -> Blocks:
        """What is chosen from."""

    @abstractmethod
    def tier_bytes(self, entries: int, shape: KVShape) -> int:
        """Of so many of its entries in the longest row."""

    @abstractmethod
    def entry_bytes(self, shape: KVShape) -> int:
        """That a step reads of an entry that it chooses, in one layer and row; they lie in the host's memory."""

    @property
    def offset(self) -> int:
        """Tokens that are raw when others have left them."""
        return self.first_tokens + self.recent_tokens

    def blocks_after(self, num_tokens: int) -> int:
        """Blocks that have left the raw tokens."""
        return max(num_tokens - self.offset, 0) // self.every_tokens

    def entries_after(self, num_tokens: int) -> int:
        return num_tokens - self.blocks_after(num_tokens) * self.every_tokens

    def stored_parts(self, row: RowProgress) -> tuple[int, ...]:
        return self.entries_after(row.num_tokens), self.blocks_after(row.num_tokens) * self.every_tokens

    def num_stored(self, row: RowProgress) -> int:
        return row.num_tokens

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        # What a token reads; all is held.
        raw, others = self.stored_parts(row)
        row.num_cached = raw + min(others, self.read_tokens)
        return ()

    def most_entries(self, num_layers: int) -> list[int]:
        return [self.offset + self.every_tokens] * num_layers

    def new_store(self, shape: KVShape, devices: Sequence[torch.device]) -> Store:
        tiers = [self.new_tier(shape, devices)]
        return HeadStore(self.most_entries(shape.num_layers), shape, devices, numbers=(), tiers=tiers)

    def store_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        raw, others = longest_row_entries
        total = head_store_bytes(self.most_entries(shape.num_layers), raw, shape, slot_numbers=0)
        return total + self.tier_bytes(others, shape)

    def read_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        _, others = longest_row_entries
        unread = allotted_blocks(others // self.every_tokens) * self.every_tokens - min(others, self.read_tokens)
        stored = self.store_bytes(longest_row_entries, shape)
        return stored - shape.num_layers * shape.num_rows * unread * self.entry_bytes(shape)

    def resident_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        # What isn't chosen is elsewhere; where the model runs on the host itself, that is the same memory.
        count = self.read_bytes if self.in_host_memory else self.store_bytes
        return count(longest_row_entries, shape)


class AttendToChosen(AttendInPieces[Kind]):
    """One query has what it chooses copied together; several read all under a mask."""

    @abstractmethod
    def scores(
        self, layer: int, states: Float[Tensor, "rows kv_heads groups seq head_dim"], scale: float
    ) -> Float[Tensor, "rows kv_heads seq choices"]:
        """What each choice is worth to each query; minus infinity where there is none."""

    @abstractmethod
    def some(self, layer: int, best: Int[Tensor, "rows kv_heads choices"]) -> BlockEntries:
        """Keys, values and positions of what is chosen."""

    def entries(self, layer: int, states: Tensor, scale: float) -> BlockEntries:
        tier, size = self.store.tiers[0], self.method.choice_tokens
        self.is_chosen = None
        most = self.method.read_tokens // size
        is_there = tier.is_there(layer).to(states.device).repeat_interleave(tier.block_entries // size, dim=1)
        if is_there.shape[1] <= most:
            return super().entries(layer, states, scale)
        best = self.scores(layer, states, scale).argsort(dim=-1, descending=True, stable=True)[..., :most]
        if states.shape[3] > 1:
            is_chosen = torch.zeros(*states.shape[:2], states.shape[3], is_there.shape[1], dtype=torch.bool)
            is_chosen = is_chosen.to(states.device).scatter(3, best, True)
            self.is_chosen = is_chosen.repeat_interleave(size, dim=3)
            return super().entries(layer, states, scale)
        best = best[:, :, 0]
        keys, values, positions = self.some(layer, best)
        is_held = is_there[:, None].expand(-1, best.shape[1], -1).gather(2, best)
        positions = positions.masked_fill(~is_held.repeat_interleave(size, dim=2), -1)
        raw = (self.store[name][layer] for name in ("keys", "values", "position"))
        keys, values, positions = (torch.cat(pair, dim=2) for pair in zip((keys, values, positions), raw, strict=True))
        return keys, values, positions

    def read(
        self, layer: int, queries: Queries, keys: Tensor, values: Tensor, scale: float, original: Original
    ) -> Tensor:
        reads = queries.reads.clone()
        if self.is_chosen is not None:
            reads[..., : self.is_chosen.shape[3]] &= self.is_chosen
        states = queries.states.flatten(1, 2)
        mask = torch.zeros(reads.shape, dtype=states.dtype, device=states.device)
        mask = mask.masked_fill(~reads, torch.finfo(states.dtype).min)
        output = original(states, keys, values, mask.repeat_interleave(queries.states.shape[2], dim=1))
        return output.view_as(queries.states)

    def change(self, layer: int, row: int, num_tokens: int, scale: float) -> None:
        if self.method.blocks_after(num_tokens):
            self.store.move_to(self.store.tiers[0], layer, row, self.method.first_tokens)

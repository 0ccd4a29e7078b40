"""Entries in fewer bits the older they are (KIVI, Liu et al., arXiv 2402.02750), in layers of every kind."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore, head_store_bytes
from thoughtformer.cache.quantised import BITS, QuantisedBlocks, quantised_bytes
from thoughtformer.cache.shape import KVShape
from thoughtformer.checks import check_count
from thoughtformer.compression.at_once import additive
from thoughtformer.compression.by_head import ByHead
from thoughtformer.compression.in_pieces import AttendInPieces, Queries
from thoughtformer.compression.method import LayersShape, PassAttention
from thoughtformer.errors import ConfigError, UnsupportedError
from thoughtformer.models.backbone import Backbone, Original
from thoughtformer.rules.schedule import Chunk, Event, RowProgress

__all__ = ["Quantised"]

#: Tokens of a block in layers with a window, at most: there what waits to be a block, or to leave, counts for more.
WINDOW_BLOCK = 32


def check_head(bits: int, shape: LayersShape) -> None:
    """Raises `UnsupportedError` where a head's numbers don't fill bytes."""
    if shape.kv.head_dim % (8 // bits):
        raise UnsupportedError(f"numbers of {bits} bits don't fill the bytes of a head of {shape.kv.head_dim}.")


@dataclass(frozen=True, kw_only=True)
class Quantised(ByHead):
    """Holds the first tokens and the recent ones raw, others in blocks of `bits` a number: tiers by age.

    A block of `block_tokens` leaves the raw ones when `recent_tokens` have followed it. Its keys share scales by
    channel, its values by token. What then is younger than `finer_tokens` has 8 bits, what is older `bits`; what is
    older than `held_tokens` is dropped. Layers with a window hold their near tokens so, too.

    Args:
        bits: of a number: 8, 4 or 2.
        first_tokens: that stay raw.
        recent_tokens: that are raw at least.
        block_tokens: that share scales of keys; in layers with a window 32 at most.
        finer_tokens: behind the raw ones that have 8 bits before they have fewer; whole blocks.
        held_tokens: that have fewer bits, finer ones included; whole blocks; None: all.
        max_bytes: of a row's cache, which decides about `held_tokens`; whoever compresses a model works it out.
        window: of the layers; None: they read all.
    """

    name = "quantised"
    found_settings = ("window",)
    computes_scores = False
    bits: int = 4
    first_tokens: int = 4
    recent_tokens: int = 64
    block_tokens: int = 64
    finer_tokens: int = 0
    held_tokens: int | None = None
    max_bytes: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise ConfigError(f"bits={self.bits}: give one of {', '.join(map(str, BITS))}.")
        check_count("first_tokens", self.first_tokens, 0)
        check_count("recent_tokens", self.recent_tokens, 0)
        check_count("block_tokens", self.block_tokens, 2)
        check_count("finer_tokens", self.finer_tokens, 0)
        for name, tokens in (("finer_tokens", self.finer_tokens), ("held_tokens", self.held_tokens or 0)):
            if tokens % self.block_tokens:
                raise ConfigError(f"{name}={tokens} is no multiple of block_tokens={self.block_tokens}.")
        if self.held_tokens is not None:
            check_count("held_tokens", self.held_tokens, self.finer_tokens)
        if self.finer_tokens and self.bits == 8:
            raise ConfigError("bits=8 are no fewer than finer_tokens have: leave finer_tokens out.")

    # What is held.

    @property
    def every_tokens(self) -> int:
        """Between two blocks that leave the raw ones."""
        return self.block_tokens

    @property
    def offset(self) -> int:
        """Raw tokens that are left when a block leaves them."""
        return self.first_tokens + self.recent_tokens

    @property
    def tiers(self) -> list[int]:
        """Bits of each tier."""
        return [8, self.bits] if self.finer_tokens else [self.bits]

    def blocks(self, num_tokens: int) -> tuple[int, int]:
        """Blocks that have left the raw tokens, and those of them that are gone."""
        left = max(num_tokens - self.offset, 0) // self.block_tokens
        gone = 0 if self.held_tokens is None else max(left - self.held_tokens // self.block_tokens, 0)
        if self.window is not None and left:
            # They go when the next block comes; then the token behind it can't read them.
            changed = self.offset + left * self.block_tokens
            gone = min(left, max(gone, (changed + 1 - self.window - self.first_tokens) // self.block_tokens))
        return left, gone

    def firsts(self, num_tokens: int) -> int:
        """First tokens that are held: layers with a window drop them with the first block."""
        return 0 if self.window is not None and self.blocks(num_tokens)[1] else self.first_tokens

    def entries_after(self, num_tokens: int) -> int:
        firsts = self.first_tokens - self.firsts(num_tokens)
        return num_tokens - firsts - self.blocks(num_tokens)[0] * self.block_tokens

    def stored_parts(self, row: RowProgress) -> tuple[int, ...]:
        left, gone = self.blocks(row.num_tokens)
        finer = min(left - gone, self.finer_tokens // self.block_tokens)
        of_tiers = (finer, left - gone - finer) if self.finer_tokens else (left - gone,)
        return (self.entries_after(row.num_tokens), *(number * self.block_tokens for number in of_tiers))

    def num_stored(self, row: RowProgress) -> int:
        return sum(self.stored_parts(row))

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        row.num_cached = self.num_stored(row)
        return ()

    def in_window(self, window: int) -> Quantised:
        return replace(
            self,
            window=window,
            block_tokens=min(self.block_tokens, WINDOW_BLOCK),
            finer_tokens=0,
            held_tokens=None,
            max_bytes=None,
        )

    def bound(self, shape: LayersShape) -> Quantised:
        check_head(self.bits, shape)
        if self.max_bytes is None:
            return self
        least = self.finer_tokens // self.block_tokens

        def most_bytes(blocks: int) -> int:
            """What layers that read all may come to with so many blocks."""
            longest = [self.offset + self.block_tokens - 1, self.finer_tokens]
            rest = (blocks - least) * self.block_tokens
            longest = [*longest, rest] if self.finer_tokens else [longest[0], rest]
            return self.store_bytes(longest, shape.kv)

        in_windows = sum(self._window_bytes(window, kv) for window, kv in shape.windows)
        needed = in_windows + most_bytes(least)
        if needed > self.max_bytes:
            raise ConfigError(
                f"max_bytes={self.max_bytes} is too little: what is raw, finer_tokens={self.finer_tokens} and layers "
                f"with a window take {needed} bytes."
            )
        longest = range(least, shape.max_tokens // self.block_tokens + 1)
        blocks = longest[bisect_right(longest, self.max_bytes - in_windows, key=most_bytes) - 1]
        return replace(self, held_tokens=blocks * self.block_tokens, max_bytes=None)

    def _window_bytes(self, window: int, shape: KVShape) -> int:
        """What layers with a window may come to."""
        beside = self.in_window(window)
        rows = map(RowProgress, range(self.offset + window + 3 * self.block_tokens))
        sizes = {beside.stored_parts(row) for row in rows}
        return max(beside.store_bytes(parts, shape) for parts in sizes)

    # How it is kept and attended to.

    @property
    def kind(self) -> str:
        return f"{self.bits} bits"

    def most_entries(self, num_layers: int) -> list[int]:
        return [self.offset + self.block_tokens] * num_layers

    def new_store(self, shape: KVShape, devices: Sequence[torch.device]) -> Store:
        tiers = [QuantisedBlocks(bits, self.block_tokens, shape, devices) for bits in self.tiers]
        return HeadStore(self.most_entries(shape.num_layers), shape, devices, numbers=(), tiers=tiers)

    def store_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        raw, *of_tiers = longest_row_entries
        total = head_store_bytes(self.most_entries(shape.num_layers), raw, shape, slot_numbers=0)
        for bits, entries in zip(self.tiers, of_tiers, strict=True):
            total += quantised_bytes(bits, self.block_tokens, entries, shape)
        return total

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendToTiers(chunk, self, store)


class AttendToTiers(AttendInPieces[Quantised]):
    """Attention to raw entries and to those of all tiers, by the model's own."""

    def __init__(self, chunk: Chunk, method: Quantised, store: HeadStore) -> None:
        self.window = method.window
        super().__init__(chunk, method, store)

    def read(
        self, layer: int, queries: Queries, keys: Tensor, values: Tensor, scale: float, original: Original
    ) -> Tensor:
        states = queries.states.flatten(1, 2)
        output = original(states, keys, values, additive(queries.reads[:, 0], states))
        return output.view_as(queries.states)

    def change(self, layer: int, row: int, num_tokens: int, scale: float) -> None:
        method, store = self.method, self.store
        left, gone = method.blocks(num_tokens)
        if not left:
            return
        block, tiers = method.block_tokens, store.tiers
        firsts = method.firsts(num_tokens - 1)
        store.move_to(tiers[0], layer, row, firsts)
        if method.finer_tokens and int(tiers[0].num_blocks[layer, row]) > method.finer_tokens // block:
            tiers[1].append(layer, row, *tiers[0].pop_first(layer, row))
        while sum(int(tier.num_blocks[layer, row]) for tier in tiers) > left - gone:
            oldest = next(tier for tier in reversed(tiers) if int(tier.num_blocks[layer, row]))
            oldest.pop_first(layer, row)
        if firsts > method.firsts(num_tokens):
            rest = torch.arange(firsts, int(store.counts_in(layer)[row]), device=store["position"][layer].device)
            store.keep(layer, row, rest.expand(len(store["position"][layer][row]), -1))

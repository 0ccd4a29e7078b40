"""Selection with the rest at hand (Quest, Tang et al., arXiv 2406.10774): each query reads pages that may matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, allotted_blocks
from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore, head_store_bytes
from thoughtformer.cache.pages import Pages, pages_bytes
from thoughtformer.checks import check_count
from thoughtformer.compression.by_head import ByHead
from thoughtformer.compression.in_pieces import AttendInPieces, Queries
from thoughtformer.compression.method import PassAttention
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError
from thoughtformer.models.backbone import Backbone, Original
from thoughtformer.rules.schedule import Chunk, Event, RowProgress

__all__ = ["Selection"]


@dataclass(frozen=True, kw_only=True)
class Selection(ByHead):
    """Drops nothing; a query reads the first and the recent tokens, and of all others `read_tokens` in pages.

    Of a page the least and the largest of each channel of its keys are at hand. From them follows the largest score
    that a query could have with any of its keys (equation 2); the pages with the largest are read, chosen for all
    query heads of a key head together. The pages themselves may lie in the host's memory.

    Args:
        read_tokens: in pages; whole pages.
        page_tokens: of a page.
        first_tokens: that all queries read.
        recent_tokens: that they read at least.
        in_host_memory: pages lie there and are copied to the model as they are chosen.
    """

    name = "selection"
    computes_scores = False
    read_tokens: int = 256
    page_tokens: int = 16
    first_tokens: int = 4
    recent_tokens: int = 64
    in_host_memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("page_tokens", self.page_tokens, 1)
        check_count("read_tokens", self.read_tokens, 0)
        check_count("first_tokens", self.first_tokens, 0)
        check_count("recent_tokens", self.recent_tokens, 0)
        if self.read_tokens % self.page_tokens:
            raise ConfigError(f"read_tokens={self.read_tokens} is no multiple of page_tokens={self.page_tokens}.")

    @property
    def every_tokens(self) -> int:
        """Between two pages that are full."""
        return self.page_tokens

    @property
    def offset(self) -> int:
        """Tokens outside of pages when one is full."""
        return self.first_tokens + self.recent_tokens

    def pages_after(self, num_tokens: int) -> int:
        """Full pages."""
        return max(num_tokens - self.offset, 0) // self.page_tokens

    def entries_after(self, num_tokens: int) -> int:
        return num_tokens - self.pages_after(num_tokens) * self.page_tokens

    def stored_parts(self, row: RowProgress) -> tuple[int, ...]:
        return self.entries_after(row.num_tokens), self.pages_after(row.num_tokens) * self.page_tokens

    def num_stored(self, row: RowProgress) -> int:
        return row.num_tokens

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        # What a token reads; all is held.
        raw, paged = self.stored_parts(row)
        row.num_cached = raw + min(paged, self.read_tokens)
        return ()

    @property
    def kind(self) -> str:
        return f"pages of {self.page_tokens}"

    def most_entries(self, num_layers: int) -> list[int]:
        return [self.offset + self.page_tokens] * num_layers

    def new_store(self, **shape: Any) -> Store:
        pages = Pages(self.page_tokens, in_host_memory=self.in_host_memory, **shape)
        return HeadStore(self.most_entries(shape["num_layers"]), (), tiers=[pages], **shape)

    def store_bytes(self, *, longest_row_entries: Sequence[int], num_layers: int, **shape: Any) -> int:
        raw, paged = longest_row_entries
        most = self.most_entries(num_layers)
        return head_store_bytes(most, longest_row_entries=raw, slot_numbers=0, **shape) + pages_bytes(
            self.page_tokens, longest_row_entries=paged, num_layers=num_layers, **shape
        )

    def read_bytes(self, *, longest_row_entries: Sequence[int], num_rows: int, **shape: Any) -> int:
        raw, paged = longest_row_entries
        unread = allotted_blocks(paged // self.page_tokens) * self.page_tokens - min(paged, self.read_tokens)
        in_entry = 2 * shape["num_kv_heads"] * shape["head_dim"] * shape["dtype"].itemsize
        stored = self.store_bytes(longest_row_entries=(raw, paged), num_rows=num_rows, **shape)
        return stored - shape["num_layers"] * num_rows * unread * in_entry

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendToPages(chunk, self, store)

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[Selection]:
        # Whole pages shall hit the target within one per cent.
        page = next((tokens for tokens in (16, 4) if tokens <= search.target / 60), 1)
        recent = min(64, int(search.target) // 4)
        yield search.crossing(
            lambda pages: cls(read_tokens=pages * page, page_tokens=page, recent_tokens=recent),
            range(search.num_tokens // page + 1),
        )


class AttendToPages(AttendInPieces[Selection]):
    """One query has its pages copied together; several read all pages under a mask."""

    def entries(self, layer: int, states: Tensor) -> BlockEntries:
        pages = self.store.tiers[0]
        assert isinstance(pages, Pages)
        self.is_chosen = None
        is_there, most = pages.is_there(layer).to(states.device), self.method.read_tokens // self.method.page_tokens
        if is_there.shape[1] <= most:
            return super().entries(layer, states)
        scores = pages.scores(layer, states).masked_fill(~is_there[:, None, None], float("-inf"))
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :most]
        if states.shape[3] > 1:
            is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(3, best, True)
            self.is_chosen = is_chosen.repeat_interleave(self.method.page_tokens, dim=3)
            return super().entries(layer, states)
        best = best[:, :, 0]
        keys, values, positions = pages.some(layer, best)
        is_page = is_there[:, None].expand(-1, best.shape[1], -1).gather(2, best)
        positions = positions.masked_fill(~is_page.repeat_interleave(self.method.page_tokens, dim=2), -1)
        raw = (self.store[name][layer] for name in ("keys", "values", "position"))
        keys, values, positions = (torch.cat(pair, dim=2) for pair in zip((keys, values, positions), raw, strict=True))
        return keys, values, positions

    def read(
        self, layer: int, queries: Queries, keys: Tensor, values: Tensor, scale: float, original: Original
    ) -> Tensor:
        reads = queries.reads.clone()
        if self.is_chosen is not None:
            reads[..., : self.is_chosen.shape[3]] &= self.is_chosen | ~queries.is_token[:, None, :, None]
        states = queries.states.flatten(1, 2)
        mask = torch.zeros(reads.shape, dtype=states.dtype, device=states.device)
        mask = mask.masked_fill(~reads, torch.finfo(states.dtype).min)
        output = original(states, keys, values, mask.repeat_interleave(queries.states.shape[2], dim=1))
        return output.view_as(queries.states)

    def change(self, layer: int, row: int, num_tokens: int, scale: float) -> None:
        if self.method.pages_after(num_tokens):
            self.store.move_to(self.store.tiers[0], layer, row, self.method.first_tokens)

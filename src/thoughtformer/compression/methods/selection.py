"""Selection with the rest at hand (Quest, Tang et al., arXiv 2406.10774): each query reads pages that may matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, Blocks
from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore
from thoughtformer.cache.pages import Pages, pages_bytes
from thoughtformer.cache.shape import KVShape
from thoughtformer.checks import check_count
from thoughtformer.compression.choosing import AttendToChosen, Choosing
from thoughtformer.compression.method import PassAttention
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError
from thoughtformer.models.backbone import Backbone
from thoughtformer.rules.schedule import Chunk

__all__ = ["Selection"]


@dataclass(frozen=True, kw_only=True)
class Selection(Choosing):
    """Drops nothing; a query reads the first and the recent tokens, and of all others `read_tokens` in pages.

    Of a page the least and the largest of each channel of its keys are at hand. From them follows the largest score
    that a query could have with any of its keys (equation 2); the pages with the largest are read, chosen for all
    query heads of a key head together. The pages themselves may lie in the host's memory.

    Args:
        read_tokens: in pages; whole pages.
        page_tokens: of a page.
        first_tokens, recent_tokens, in_host_memory: as in `Choosing`.
    """

    name = "selection"
    page_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("page_tokens", self.page_tokens, 1)
        if self.read_tokens % self.page_tokens:
            raise ConfigError(f"read_tokens={self.read_tokens} is no multiple of page_tokens={self.page_tokens}.")

    @property
    def every_tokens(self) -> int:
        return self.page_tokens

    @property
    def choice_tokens(self) -> int:
        return self.page_tokens

    @property
    def kind(self) -> str:
        return f"pages of {self.page_tokens}"

    def new_tier(self, shape: KVShape, devices: Sequence[torch.device]) -> Blocks:
        return Pages(self.page_tokens, shape, devices, in_host_memory=self.in_host_memory)

    def tier_bytes(self, entries: int, shape: KVShape) -> int:
        return pages_bytes(self.page_tokens, entries, shape)

    def entry_bytes(self, shape: KVShape) -> int:
        return shape.num_kv_heads * shape.head_bytes

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


class AttendToPages(AttendToChosen[Selection]):
    """By bounds of their keys."""

    @property
    def pages(self) -> Pages:
        """What is chosen from."""
        (pages,) = self.store.tiers
        assert isinstance(pages, Pages)
        return pages

    def scores(self, layer: int, states: Tensor, scale: float) -> Tensor:
        is_there = self.pages.is_there(layer).to(states.device)
        return self.pages.scores(layer, states).masked_fill(~is_there[:, None, None], float("-inf"))

    def some(self, layer: int, best: Tensor) -> BlockEntries:
        return self.pages.some(layer, best)

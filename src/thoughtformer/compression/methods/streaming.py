"""StreamingLLM (Xiao et al., arXiv 2309.17453): the first tokens and a recent window, with positions in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thoughtformer.cache.entries import EntrySlots, Store
from thoughtformer.checks import check_count
from thoughtformer.compression.method import Method, PassAttention
from thoughtformer.compression.on_cache import AttendOnCache
from thoughtformer.compression.on_devices import OnDevices
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError
from thoughtformer.models.backbone import Backbone, Original, Rotation
from thoughtformer.rules.entries import Entries
from thoughtformer.rules.schedule import Chunk, Event, RowProgress

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Holds the first tokens, attention's sinks, and the most recent ones, `max_entries` in all.

    With rotary positions, distances are those inside the cache (section 3.2): the window's are the text's own, the
    sinks stay `max_entries` away. Models with learned positions have them inside their keys, so there they stay.
    """

    name = "streaming"
    needs_store = True
    computes_scores = True
    max_entries: int = 64
    first_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first_tokens", self.first_tokens, 0)
        check_count("max_entries", self.max_entries, 1)
        if self.max_entries <= self.first_tokens:
            raise ConfigError(
                f"max_entries={self.max_entries} leaves no window beside first_tokens={self.first_tokens}."
            )

    def check(self, backbone: Backbone) -> None:
        if backbone.rotation is not None:
            super().check(backbone)

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        if row.num_tokens >= self.max_entries:
            position = row.num_tokens - self.max_entries + self.first_tokens
            yield Event(position, position, row.num_tokens - 1)

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[StreamingLLM]:
        yield search.crossing(lambda entries: cls(max_entries=entries), search.budgets)

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        if backbone.rotation is None:
            return super().attend(chunk, store, backbone=backbone, execution=execution)
        assert isinstance(store, EntrySlots)
        return AttendFromTheCache(chunk, store, self, backbone.rotation)


class AttendFromTheCache(AttendOnCache):
    """Queries as far from the sinks as the cache is long; `turn` is how the model turns its queries."""

    always_masks = True

    def __init__(self, chunk: Chunk, slots: EntrySlots, method: StreamingLLM, turn: Rotation) -> None:
        self.first_tokens, self.turn = method.first_tokens, turn
        super().__init__(chunk, slots)
        self.back = OnDevices(-(chunk.entries.position.long() + 1 - method.max_entries).clamp(min=0))

    def see(self, cached: Entries) -> None:
        self.is_sink = OnDevices((cached.position < self.first_tokens)[:, None, None, :])

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scale: float, original: Original
    ) -> Tensor:
        groups = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        turned = self.turn(query, self.back.at(query.device)) @ keys.mT
        scores = torch.where(self.is_sink.at(query.device), turned, query @ keys.mT) * scale + mask
        return scores.softmax(dim=-1) @ values

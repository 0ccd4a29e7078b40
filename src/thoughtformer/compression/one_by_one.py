"""What methods share that hold a number of entries for each head: when it is full, each new token takes one's place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore
from thoughtformer.compression.by_head import AttendByHead, ByHead
from thoughtformer.compression.method import PassAttention
from thoughtformer.compression.solving import Search
from thoughtformer.models.backbone import Backbone, Original
from thoughtformer.rules.schedule import Chunk, Event, RowProgress

__all__ = ["AttendOneByOne", "OneByOne"]

Kind = TypeVar("Kind", bound="OneByOne")


@dataclass(frozen=True, kw_only=True)
class OneByOne(ByHead):
    """Of a full head's entries that with the smallest number makes room for the next token; of equals the oldest."""

    decides_each_token = True
    max_entries: int = 64

    @property
    def kind(self) -> str:
        return f"at most {self.max_entries} a head"

    @property
    def recent_tokens(self) -> int:
        """The last tokens, which never make room."""
        return 0

    @abstractmethod
    def weighed(
        self,
        before: Float[Tensor, "batch kv_heads slots"],
        weights: Float[Tensor, "batch kv_heads groups slots"],
    ) -> Float[Tensor, "batch kv_heads slots"]:
        """Each entry's number, from that of before and from what the queries of a new token attend to."""

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        # Which token goes is the heads' own affair; here only how many are held.
        row.num_cached = min(row.num_cached, self.max_entries - 1)
        return ()

    def most_entries(self, num_layers: int) -> list[int]:
        return [self.max_entries] * num_layers

    def entries_after(self, num_tokens: int) -> int:
        return min(num_tokens, self.max_entries)

    @classmethod
    def at_entries(cls: type[Kind], search: Search) -> Iterator[Kind]:
        yield search.crossing(lambda entries: cls(max_entries=entries), search.budgets)

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendOneByOne(chunk, self, store)


class AttendOneByOne(AttendByHead[OneByOne]):
    """One token after another: what a token may read depends on what those before it read.

    A new token takes the slot of the one that makes room, so that a full store never moves anything.
    """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, original: Original) -> Tensor:
        output = torch.zeros_like(query)
        new, held = self.is_new.at(query.device), self.store["attention"][layer]
        for column in range(query.shape[3]):
            is_new = new[:, column, None, None]
            weights = self._step(layer, query[:, :, :, column], key[:, :, column], value[:, :, column], column, scale)
            output[:, :, :, column] = weights @ self.store["values"][layer]
            held.copy_(torch.where(is_new, self.method.weighed(held, weights), held))
        return output

    def _step(
        self,
        layer: int,
        query: Float[Tensor, "batch kv_heads groups head_dim"],
        key: Float[Tensor, "batch kv_heads head_dim"],
        value: Float[Tensor, "batch kv_heads head_dim"],
        column: int,
        scale: float,
    ) -> Float[Tensor, "batch kv_heads groups slots"]:
        """Writes one token a row, and returns what its queries attend to."""
        keys, values, attention, held = (
            self.store[name][layer] for name in ("keys", "values", "attention", "position")
        )
        position, is_new = self.position.at(key.device)[:, column], self.is_new.at(key.device)[:, column]
        # What is padding has a position, but may have no slot.
        index = self._victim(held, attention, position).masked_fill(~is_new[:, None], 0)[..., None]
        for cached, new in ((keys, key), (values, value)):
            place = index[..., None].expand(-1, -1, 1, cached.shape[3])
            old = cached.gather(2, place)
            cached.scatter_(2, place, torch.where(is_new[:, None, None, None], new.unsqueeze(2), old))
        for tensor, new in ((attention, 0), (held, position[:, None, None])):
            fresh = torch.as_tensor(new, dtype=tensor.dtype, device=tensor.device).expand_as(index)
            tensor.scatter_(2, index, torch.where(is_new[:, None, None], fresh, tensor.gather(2, index)))
        is_cached: Bool[Tensor, "batch kv_heads 1 slots"] = (held >= 0).unsqueeze(2)
        # A padded query of a row that holds nothing reads everything, so that it is a number.
        is_cached = is_cached | ~is_cached.any(dim=3, keepdim=True)
        return ((query @ keys.mT) * scale).masked_fill(~is_cached, float("-inf")).softmax(dim=-1)

    def _victim(
        self,
        held: Int[Tensor, "batch kv_heads slots"],
        attention: Float[Tensor, "batch kv_heads slots"],
        position: Int[Tensor, " batch"],
    ) -> Int[Tensor, "batch kv_heads"]:
        """The slot that the token at `position` takes: a free one, or that of the least attended among the older."""
        is_recent = held > (position - 1 - self.method.recent_tokens)[:, None, None]
        worth = attention.masked_fill(is_recent, float("inf"))
        least = worth.amin(dim=2, keepdim=True)
        taken = torch.where(worth == least, held, torch.iinfo(torch.int32).max).argmin(dim=2)
        free = position.clamp(max=self.method.max_entries)[:, None].expand_as(taken).long()
        return torch.where(free < self.method.max_entries, free, taken)

"""What methods share whose layers and key heads hold entries of their own, chosen by what queries attend to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore, head_store_bytes
from thoughtformer.cache.shape import KVShape
from thoughtformer.compression.method import Method
from thoughtformer.compression.on_devices import OnDevices
from thoughtformer.models.backbone import Original
from thoughtformer.rules.entries import TOKEN
from thoughtformer.rules.schedule import Chunk, RowProgress

__all__ = ["AttendByHead", "ByHead"]

Kind = TypeVar("Kind", bound="ByHead")


@dataclass(frozen=True, kw_only=True)
class ByHead(Method):
    """A method whose entries are in a `HeadStore`."""

    can_train = False
    computes_scores = True
    needs_store = True

    @abstractmethod
    def entries_after(self, num_tokens: int) -> int:
        """Entries that the fullest layer holds in its slots after so many tokens."""

    def num_stored(self, row: RowProgress) -> int:
        return self.entries_after(row.num_tokens)

    @abstractmethod
    def most_entries(self, num_layers: int) -> list[int]:
        """Entries that each layer's slots may come to, the token under way included."""

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        """What is known of a row in a layer beside its entries: names, and shapes."""
        return {}

    def new_store(self, shape: KVShape, devices: Sequence[torch.device]) -> Store:
        return HeadStore(self.most_entries(shape.num_layers), shape, devices, state=self.state)

    def store_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        return head_store_bytes(
            self.most_entries(shape.num_layers),
            longest_row_entries[0],
            shape,
            state_numbers=sum(torch.Size(tail).numel() for tail in self.state.values()),
        )


class AttendByHead(ABC, Generic[Kind]):
    """A pass in which a layer writes what is new, attends and drops, piece by piece in the order of the text."""

    def __init__(self, chunk: Chunk, method: Kind, store: HeadStore) -> None:
        self.method, self.store = method, store
        self.position = OnDevices(chunk.entries.position)
        #: What each layer was given, in case the pass is made again.
        self.given: dict[int, tuple[Tensor, Tensor, Tensor, float, Original]] = {}
        self.remembers = store.waits
        if self.remembers:
            store.passes.append(self)
        self.begin(chunk.entries.order == TOKEN)

    def begin(self, is_new: Bool[Tensor, "rows seq"]) -> None:
        """Makes room for the new tokens; all else in a row is padding."""
        position, lengths = self.position.at(is_new.device), self.store.raw_lengths
        self.is_new = OnDevices(is_new)
        num_tokens = torch.where(is_new, position, -1).amax(dim=1) + 1
        after = torch.tensor([self.method.entries_after(number) for number in num_tokens.tolist()], dtype=torch.long)
        self.lengths = torch.where(num_tokens > 0, after, lengths)
        self.store.make_room(int((lengths + is_new.sum(dim=1)).max()) if len(lengths) else 0)

    def finish(self) -> None:
        """All layers are done: the rows hold what is left."""
        self.store.raw_lengths = self.lengths
        self.store.fit()

    def again(self, next_position: Int[Tensor, " rows"]) -> None:
        """Makes the pass again, as if it had been given each row's tokens before these positions alone."""
        is_new = self.is_new.at(next_position.device)
        self.begin(is_new & (self.position.at(next_position.device) < next_position[:, None]))
        for layer, given in self.given.items():
            self.attend(layer, *given)
        self.finish()

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
        *,
        scale: float,
        dropout: float,
        original: Original,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        batch, heads, seq, head_dim = query.shape
        kv_heads = key.shape[1]
        query = query.reshape(batch, kv_heads, heads // kv_heads, seq, head_dim)
        if self.remembers:
            self.given[layer] = (query, key, value, scale, original)
        return self.attend(layer, query, key, value, scale, original).reshape(batch, heads, seq, head_dim)

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch kv_heads groups seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
        scale: float,
        original: Original,
    ) -> Float[Tensor, "batch kv_heads groups seq head_dim"]:
        """A layer's attention; what it drops is gone afterwards."""

"""What methods share that read a text twice, chunk by chunk, and keep of a chunk what its second reading attends to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.cache.blocks import Blocks
from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore, head_store_bytes
from thoughtformer.cache.shape import KVShape
from thoughtformer.checks import check_count, check_fraction
from thoughtformer.compression.by_head import ByHead
from thoughtformer.compression.in_pieces import AttendInPieces, Queries
from thoughtformer.compression.method import LayersShape, PassAttention
from thoughtformer.compression.solving import Search
from thoughtformer.models.backbone import Backbone, Original
from thoughtformer.rules.schedule import Chunk, Event, RowProgress

__all__ = ["AttendAgain", "AttendOnce", "Held", "Rereading"]

Kind = TypeVar("Kind", bound="Rereading")

#: Queries whose attention is looked at together.
TOGETHER = 128


@dataclass(frozen=True, kw_only=True)
class Rereading(ByHead):
    """Once `recent_tokens` have followed a chunk, its tokens are read again behind all that was read, and not stored.

    So a text costs two passes, while it is read and while it is written. There is no instruction before the second
    reading: a base model needs none. A chunk whose second reading would end behind the model's trained positions is
    held as it is. What a second reading dropped can't be found again, so that no tokens can be taken back.

    Args:
        removed: fraction of a chunk's entries that is dropped.
        chunk_tokens: that are read again together.
        first_tokens: that stay.
        recent_tokens: between a chunk and its second reading.
        max_tokens: positions that the model was trained for; whoever compresses it finds them.
    """

    can_reread = True
    found_settings = ("max_tokens",)
    #: Names of what is known of an entry.
    numbers: ClassVar[tuple[str, ...]] = ()
    removed: float = 0.7
    chunk_tokens: int = 1024
    first_tokens: int = 4
    recent_tokens: int = 64
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("removed", self.removed)
        check_count("chunk_tokens", self.chunk_tokens, 2)
        check_count("first_tokens", self.first_tokens, 0)
        check_count("recent_tokens", self.recent_tokens, 0)

    @property
    def kept_tokens(self) -> int:
        """Entries that stay of a chunk."""
        return round((1 - self.removed) * self.chunk_tokens)

    @property
    def offset(self) -> int:
        """Tokens that are in no chunk when one is read again."""
        return self.first_tokens + self.recent_tokens

    @property
    def every_tokens(self) -> int:
        """Between two second readings."""
        return self.chunk_tokens

    @property
    def window_tokens(self) -> int:
        return self.chunk_tokens + self.recent_tokens

    def chunks_after(self, num_tokens: int) -> int:
        """Chunks that have been read twice."""
        last = num_tokens if self.max_tokens is None else min(num_tokens, self.max_tokens - self.chunk_tokens)
        return max(last - self.offset, 0) // self.chunk_tokens

    def rereads(self, num_tokens: int) -> range | None:
        if self.chunks_after(num_tokens) == self.chunks_after(num_tokens - 1):
            return None
        return range(num_tokens - self.recent_tokens - self.chunk_tokens, num_tokens - self.recent_tokens)

    def stored_parts(self, row: RowProgress) -> tuple[int, ...]:
        chunks = self.chunks_after(row.num_tokens)
        return (row.num_tokens - chunks * (self.chunk_tokens - self.kept_tokens),)

    def entries_after(self, num_tokens: int) -> int:
        return self.stored_parts(RowProgress(num_tokens))[0]

    def num_stored(self, row: RowProgress) -> int:
        return sum(self.stored_parts(row))

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        row.num_cached = self.num_stored(row)
        return ()

    def bound(self: Kind, shape: LayersShape) -> Kind:
        return replace(self, max_tokens=shape.max_tokens)

    @property
    def kind(self) -> str:
        return "read twice"

    def most_entries(self, num_layers: int) -> list[int]:
        # What is kept of all chunks has no end.
        return [1 << 40] * num_layers

    def tiers(self, shape: KVShape, devices: Sequence[torch.device]) -> list[Blocks]:
        """What holds that which is kept, if not slots."""
        return []

    def new_store(self, shape: KVShape, devices: Sequence[torch.device]) -> Store:
        most = self.most_entries(shape.num_layers)
        return RereadStore(most, shape, devices, numbers=self.numbers, tiers=self.tiers(shape, devices))

    def store_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        most = self.most_entries(shape.num_layers)
        return head_store_bytes(most, longest_row_entries[0], shape, slot_numbers=len(self.numbers))

    @classmethod
    def at_entries(cls: type[Kind], search: Search) -> Iterator[Kind]:
        # In short texts an entry of a chunk moves the mean by more than one per cent: fewer recent tokens do as well.
        for chunk in search.chunks():
            for recent in range(min(16, chunk), min(16, chunk) // 2, -1):
                settings = {"chunk_tokens": chunk, "recent_tokens": recent}
                yield search.crossing(
                    lambda fraction, settings=settings: cls(removed=fraction, **settings), search.all_fractions
                )

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendOnce(chunk, self, store)


class RereadStore(HeadStore):
    """What a second reading dropped can't be found again."""

    can_wait = False


class AttendOnce(AttendInPieces[Rereading]):
    """The first reading; a number of entries called `bias` is added to their scores."""

    def read(
        self, layer: int, queries: Queries, keys: Tensor, values: Tensor, scale: float, original: Original
    ) -> Tensor:
        scores = (queries.states @ keys[:, :, None].mT) * scale
        if "bias" in self.method.numbers:
            scores = scores + self.store["bias"][layer][:, :, None, None].to(scores.dtype)
        return scores.masked_fill(~queries.reads[:, :, None], float("-inf")).softmax(dim=-1) @ values[:, :, None]

    def change(self, layer: int, row: int, num_tokens: int, scale: float) -> None:
        """Nothing goes before the second reading."""

    def finish(self) -> None:
        self.store.raw_lengths = self.store.counts_in(0).cpu()
        self.store.fit()


@dataclass(frozen=True, eq=False)
class Held:
    """A chunk's entries in a row and layer, in the order of the text, and where they are in the slots.

    Attributes:
        slots: of the chunk.
        keys, values, position: of its entries, by key head.
        queries: of the second reading.
        most: the largest attention that any of them pays each entry.
    """

    slots: slice
    keys: Float[Tensor, "kv_heads entries head_dim"]
    values: Float[Tensor, "kv_heads entries head_dim"]
    position: Int[Tensor, "kv_heads entries"]
    queries: Float[Tensor, "kv_heads groups seq head_dim"]
    most: Float[Tensor, "kv_heads entries"]


class AttendAgain(Generic[Kind]):
    """The second reading: queries read all that is held, and one another. At its end a method keeps what it will."""

    def __init__(self, chunk: Chunk, method: Kind, store: HeadStore) -> None:
        self.method, self.store = method, store
        self.num_tokens = chunk.entries.position[:, 0].tolist()
        self.rows = [row for row, number in enumerate(chunk.num_new.tolist()) if number]
        #: By layer: queries, the most that each slot got, and the scale of scores.
        self.seen: dict[int, tuple[Tensor, Tensor, float]] = {}

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
        keys, values, held = self.store.entries(layer)
        num_held, num_raw = held.shape[2], self.store["position"][layer].shape[2]
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        query = query.view(batch, key.shape[1], -1, seq, head_dim)
        output, most = torch.empty_like(query), key.new_zeros(*held.shape[:2], num_raw)
        column = torch.arange(seq, device=query.device)
        for part in column.split(TOGETHER):
            scores = (query[:, :, :, part] @ keys[:, :, None].mT) * scale
            if "bias" in self.method.numbers:
                scores[..., :num_held] += self.store["bias"][layer][:, :, None, None].to(scores.dtype)
            reads: Bool[Tensor, "batch kv_heads seq entries"] = torch.cat(
                [
                    (held >= 0).unsqueeze(2).expand(-1, -1, len(part), -1),
                    (column <= part[:, None]).expand(batch, key.shape[1], -1, -1),
                ],
                dim=3,
            )
            weights = scores.masked_fill(~reads[:, :, None], float("-inf")).softmax(dim=-1)
            output[:, :, :, part] = weights @ values[:, :, None]
            most = torch.maximum(most, weights[..., num_held - num_raw : num_held].amax(dim=(2, 3)))
        self.seen[layer] = query, most, scale
        return output.view(batch, heads, seq, head_dim)

    def finish(self) -> None:
        """Each head keeps what it will of the chunks."""
        store = self.store
        for layer, (query, most, scale) in self.seen.items():
            for row in self.rows:
                count = int(store.counts_in(layer)[row])
                position = store["position"][layer][row, :, :count]
                end = self.num_tokens[row] - self.method.recent_tokens
                start = int((position[0] < end - self.method.chunk_tokens).sum())
                chunk = slice(start, start + self.method.chunk_tokens)
                keys, values = (store[name][layer][row, :, chunk] for name in ("keys", "values"))
                held = Held(chunk, keys, values, position[:, chunk], query[row], most[row, :, chunk])
                stay = self.keep(layer, row, held, scale)
                slots = torch.arange(count, device=stay.device).expand(len(stay), -1)
                store.keep(layer, row, torch.cat([slots[:, :start], stay + start, slots[:, chunk.stop :]], dim=1))
        store.raw_lengths = store.raw_lengths.clone()
        for row in self.rows:
            store.raw_lengths[row] = self.method.entries_after(self.num_tokens[row])
        store.fit()

    @abstractmethod
    def keep(self, layer: int, row: int, held: Held, scale: float) -> Int[Tensor, "kv_heads kept"]:
        """Which of a chunk's entries stay in their slots, in the order of the text; what they are may be changed."""

    def best(self, worth: Float[Tensor, "kv_heads entries"]) -> Int[Tensor, "kv_heads kept"]:
        """The entries of most worth, in the order of the text; of equals the older."""
        order = worth.argsort(dim=-1, descending=True, stable=True)
        return order[:, : self.method.kept_tokens].sort(dim=-1).values

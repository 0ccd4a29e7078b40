"""KVzip (Kim et al., arXiv 2505.23416): what the model needs to say the text again is kept, whatever is asked later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore, head_store_bytes
from thoughtformer.cache.quantised import BITS, quantised_bytes
from thoughtformer.checks import check_count, check_fraction
from thoughtformer.compression.by_head import ByHead
from thoughtformer.compression.in_pieces import AttendInPieces, Queries
from thoughtformer.compression.method import LayersShape, Method, PassAttention
from thoughtformer.compression.methods.quantised import Quantised
from thoughtformer.compression.on_devices import OnDevices
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError, UnsupportedError
from thoughtformer.models.backbone import Backbone, Original
from thoughtformer.rules.entries import TOKEN
from thoughtformer.rules.schedule import Chunk, Event, RowProgress

__all__ = ["KVzip"]

#: Queries whose attention is looked at together.
TOGETHER = 128


@dataclass(frozen=True, kw_only=True)
class KVzip(ByHead):
    """Reads each chunk of a text a second time, and of its entries keeps those that the second reading attends to.

    When `recent_tokens` have followed a chunk, its tokens are read again behind all that was read, and stored nowhere.
    An entry is worth the most attention that any of these queries, of any query head that shares its key head, pays
    it (section 3.2; here over all that is held). So a text costs two passes, while it is read and while it is written.
    There is no instruction before the second reading: a base model needs none. A chunk whose second reading would end
    behind the model's trained positions is held as it is.

    Args:
        removed: fraction of a chunk's entries that is dropped.
        chunk_tokens: that are read again together.
        first_tokens: that stay.
        recent_tokens: between a chunk and its second reading.
        bits: 8, 4 or 2: of what is kept of a chunk, as `Quantised` does it, in layers with a window, too; None: raw.
        block_tokens: that then share scales.
        max_tokens: positions that the model was trained for; whoever compresses it finds them.
    """

    name = "kvzip"
    can_reread = True
    removed: float = 0.7
    chunk_tokens: int = 1024
    first_tokens: int = 4
    recent_tokens: int = 64
    bits: int | None = None
    block_tokens: int = 64
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("removed", self.removed)
        check_count("chunk_tokens", self.chunk_tokens, 2)
        check_count("first_tokens", self.first_tokens, 0)
        check_count("recent_tokens", self.recent_tokens, 0)
        check_count("block_tokens", self.block_tokens, 2)
        if self.bits is not None and self.bits not in BITS:
            raise ConfigError(f"bits={self.bits}: give one of {', '.join(map(str, BITS))}, or None.")
        if self.bits is not None and self.chunk_tokens < self.block_tokens:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens} are less than block_tokens={self.block_tokens}.")

    @property
    def kept_tokens(self) -> int:
        """Entries that stay of a chunk; whole blocks where they have fewer bits."""
        kept = (1 - self.removed) * self.chunk_tokens
        return round(kept) if self.bits is None else max(round(kept / self.block_tokens), 1) * self.block_tokens

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
        raw, kept = row.num_tokens - chunks * self.chunk_tokens, chunks * self.kept_tokens
        return (raw + kept,) if self.bits is None else (raw, kept)

    def entries_after(self, num_tokens: int) -> int:
        return self.stored_parts(RowProgress(num_tokens))[0]

    def num_stored(self, row: RowProgress) -> int:
        return sum(self.stored_parts(row))

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        row.num_cached = self.num_stored(row)
        return ()

    def in_window(self, window: int) -> Method | None:
        if self.bits is None:
            return None
        return Quantised(
            bits=self.bits,
            first_tokens=self.first_tokens,
            recent_tokens=min(self.recent_tokens, 16),
            block_tokens=min(self.block_tokens, 32),
            window=window,
        )

    def bound(self, shape: LayersShape) -> KVzip:
        if self.bits is not None and shape.head_dim % (8 // self.bits):
            raise UnsupportedError(f"numbers of {self.bits} bits don't fill the bytes of a head of {shape.head_dim}.")
        return replace(self, max_tokens=shape.max_tokens)

    @property
    def kind(self) -> str:
        return "read twice" if self.bits is None else f"read twice, {self.bits} bits"

    def most_entries(self, num_layers: int) -> list[int]:
        # What is kept of all chunks has no end.
        return [1 << 40] * num_layers

    @property
    def _tiers(self) -> list[tuple[int, int]]:
        return [] if self.bits is None else [(self.bits, self.block_tokens)]

    def new_store(self, **shape: Any) -> Store:
        return ZippedStore(self.most_entries(shape["num_layers"]), tiers=self._tiers, **shape)

    def store_bytes(self, *, longest_row_entries: Sequence[int], num_layers: int, **shape: Any) -> int:
        raw, *kept = longest_row_entries
        total = head_store_bytes(self.most_entries(num_layers), longest_row_entries=raw, **shape)
        for (bits, block), entries in zip(self._tiers, kept, strict=True):
            total += quantised_bytes(bits, block, longest_row_entries=entries, num_layers=num_layers, **shape)
        return total

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendOnce(chunk, self, store)

    def attend_again(self, chunk: Chunk, store: Store, *, backbone: Backbone) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendAgain(chunk, self, store)

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[KVzip]:
        for chunk in (256, 64, 16):
            if chunk <= search.num_tokens // 4:
                yield search.crossing(
                    lambda fraction, chunk=chunk: cls(
                        removed=fraction, chunk_tokens=chunk, recent_tokens=min(16, chunk)
                    ),
                    [number / 100 for number in range(99, -1, -1)],
                )


class ZippedStore(HeadStore):
    """What a second reading dropped can't be found again."""

    can_wait = False


class AttendOnce(AttendInPieces[KVzip]):
    """The first reading."""

    def read(
        self, layer: int, queries: Queries, keys: Tensor, values: Tensor, scale: float, original: Original
    ) -> Tensor:
        scores = (queries.states @ keys[:, :, None].mT) * scale
        return scores.masked_fill(~queries.reads[:, :, None], float("-inf")).softmax(dim=-1) @ values[:, :, None]

    def change(self, layer: int, row: int, num_tokens: int, scale: float) -> None:
        """Nothing goes before the second reading."""

    def finish(self) -> None:
        # What the second reading will drop is still there.
        counts = self.store.counts_in(0)
        self.store.raw_lengths = counts
        self.store.fit()


class AttendAgain:
    """The second reading: queries read all that is held, and one another; the most that an entry gets is noted."""

    def __init__(self, chunk: Chunk, method: KVzip, store: HeadStore) -> None:
        self.method, self.store = method, store
        self.is_new = OnDevices(chunk.entries.order == TOKEN)
        self.num_tokens = chunk.entries.position[:, 0].tolist()
        self.rows = [row for row, ids in enumerate(chunk.num_new.tolist()) if ids]

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
        output = torch.empty_like(query)
        most = torch.zeros_like(self.store["attention"][layer])
        is_new, column = self.is_new.at(query.device), torch.arange(seq, device=query.device)
        for part in column.split(TOGETHER):
            reads_new = (column <= part[:, None]).expand(batch, key.shape[1], -1, -1)
            reads = torch.cat([(held >= 0).unsqueeze(2).expand(-1, -1, len(part), -1), reads_new], dim=3)
            scores = (query[:, :, :, part] @ keys[:, :, None].mT) * scale
            weights = scores.masked_fill(~reads[:, :, None], float("-inf")).softmax(dim=-1)
            output[:, :, :, part] = weights @ values[:, :, None]
            seen = weights.masked_fill(~is_new[:, None, None, part, None], 0)
            most = torch.maximum(most, seen[..., num_held - num_raw : num_held].amax(dim=(2, 3)).to(most.dtype))
        self.store["attention"][layer] = most
        return output.view(batch, heads, seq, head_dim)

    def finish(self) -> None:
        """Each head keeps of the chunk what it was worth most."""
        method, store = self.method, self.store
        for layer in range(len(store["keys"])):
            for row in self.rows:
                self._choose(layer, row, self.num_tokens[row] - method.recent_tokens)
        for row in self.rows:
            store.raw_lengths[row] = method.entries_after(self.num_tokens[row])
        store["attention"][:] = [torch.zeros_like(worth) for worth in store["attention"]]
        store.fit()

    def _choose(self, layer: int, row: int, end: int) -> None:
        """Of the chunk that ends before a position."""
        method, store = self.method, self.store
        count = int(store.counts_in(layer)[row])
        held, worth = (store[name][layer][row, :, :count] for name in ("position", "attention"))
        is_old = held < end - method.chunk_tokens
        num_old = int(is_old[0].sum())
        chunk = slice(num_old, num_old + method.chunk_tokens)
        best = worth[:, chunk].argsort(dim=-1, descending=True, stable=True)[:, : method.kept_tokens]
        kept = best.sort(dim=-1).values + num_old
        slots = torch.arange(count, device=held.device).expand(len(held), -1)
        if method.bits is not None:
            keys, values = (store[name][layer][row] for name in ("keys", "values"))
            positions = held.gather(1, kept)
            index = kept[..., None].expand(-1, -1, keys.shape[2])
            chosen = keys.gather(1, index), values.gather(1, index), positions
            for block in range(0, method.kept_tokens, method.block_tokens):
                store.tiers[0].append(layer, row, *(part[:, block : block + method.block_tokens] for part in chosen))
            kept = kept[:, :0]
        store.keep(layer, row, torch.cat([slots[:, :num_old], kept, slots[:, chunk.stop :]], dim=1))

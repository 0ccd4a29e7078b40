"""KVzip (Kim et al., arXiv 2505.23416): what the model needs to say the text again is kept, whatever is asked later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thoughtformer.cache.blocks import Blocks
from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore
from thoughtformer.cache.quantised import BITS, QuantisedBlocks, quantised_bytes
from thoughtformer.cache.shape import KVShape
from thoughtformer.checks import check_count
from thoughtformer.compression.method import LayersShape, Method, PassAttention
from thoughtformer.compression.methods.quantised import WINDOW_BLOCK, Quantised, check_head
from thoughtformer.compression.rereading import AttendAgain, Held, Rereading
from thoughtformer.errors import ConfigError
from thoughtformer.models.backbone import Backbone
from thoughtformer.rules.schedule import Chunk, RowProgress

__all__ = ["KVzip"]


@dataclass(frozen=True, kw_only=True)
class KVzip(Rereading):
    """Of a chunk, each head keeps the entries that its second reading attends to.

    An entry is worth the most attention that any query of the second reading, of any query head that shares its key
    head, pays it (section 3.2; here over all that is held).

    Args:
        bits: 8, 4 or 2: of what is kept of a chunk, as `Quantised` does it, in layers with a window, too; None: raw.
        block_tokens: that then share scales; a chunk keeps whole blocks.
    """

    name = "kvzip"
    bits: int | None = None
    block_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block_tokens", self.block_tokens, 2)
        if self.bits is not None and self.bits not in BITS:
            raise ConfigError(f"bits={self.bits}: give one of {', '.join(map(str, BITS))}, or None.")
        if self.bits is not None and self.chunk_tokens < self.block_tokens:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens} are less than block_tokens={self.block_tokens}.")

    @property
    def kept_tokens(self) -> int:
        kept = (1 - self.removed) * self.chunk_tokens
        return round(kept) if self.bits is None else max(round(kept / self.block_tokens), 1) * self.block_tokens

    def tiers(self, shape: KVShape, devices: Sequence[torch.device]) -> list[Blocks]:
        if self.bits is None:
            return []
        return [QuantisedBlocks(self.bits, self.block_tokens, shape, devices, is_span=False)]

    def stored_parts(self, row: RowProgress) -> tuple[int, ...]:
        if self.bits is None:
            return super().stored_parts(row)
        chunks = self.chunks_after(row.num_tokens)
        return row.num_tokens - chunks * self.chunk_tokens, chunks * self.kept_tokens

    def store_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        total = super().store_bytes(longest_row_entries, shape)
        if self.bits is not None:
            total += quantised_bytes(self.bits, self.block_tokens, longest_row_entries[1], shape, is_span=False)
        return total

    def in_window(self, window: int) -> Method | None:
        if self.bits is None:
            return None
        return Quantised(
            bits=self.bits,
            first_tokens=self.first_tokens,
            recent_tokens=min(self.recent_tokens, 16),
            block_tokens=min(self.block_tokens, WINDOW_BLOCK),
            window=window,
        )

    def bound(self, shape: LayersShape) -> KVzip:
        if self.bits is not None:
            check_head(self.bits, shape)
        return super().bound(shape)

    @property
    def kind(self) -> str:
        return super().kind if self.bits is None else f"{super().kind}, {self.bits} bits"

    def attend_again(self, chunk: Chunk, store: Store, *, backbone: Backbone) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendToZip(chunk, self, store)


class AttendToZip(AttendAgain[KVzip]):
    """What stays has fewer bits, if that is asked for."""

    def keep(self, layer: int, row: int, held: Held, scale: float) -> Tensor:
        best, method = self.best(held.most), self.method
        if method.bits is None:
            return best
        index = best[..., None].expand(-1, -1, held.keys.shape[2])
        kept = held.keys.gather(1, index), held.values.gather(1, index), held.position.gather(1, best)
        for block in range(0, method.kept_tokens, method.block_tokens):
            parts = (part[:, block : block + method.block_tokens] for part in kept)
            self.store.tiers[0].append(layer, row, *parts)
        return best[:, :0]

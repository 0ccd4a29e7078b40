"""Block summaries after Combiner-Fixed (Ren et al., arXiv 2107.05768, section 4.2), without training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thoughtformer.cache.entries import ENTRY_FIELDS, EntrySlots, Store
from thoughtformer.compression.folding import Folding
from thoughtformer.compression.method import PassAttention
from thoughtformer.compression.on_cache import AttendOnCache
from thoughtformer.compression.on_devices import OnDevices
from thoughtformer.models.backbone import Backbone, Original
from thoughtformer.rules.entries import FOREVER, OPEN, Entries
from thoughtformer.rules.schedule import Chunk

__all__ = ["Combiner"]


@dataclass(frozen=True, kw_only=True)
class Combiner(Folding):
    """Folds each block into the mean of its keys and the mean of its values, weighed as many.

    A summary of n tokens with key K and value V takes part in softmax with exp(q K + log n), which is exact where all
    keys of the block are equal. The paper learns its summaries' query-independent weights; here they are uniform. Its
    blocks are folded as they finish: `EveryTokens(span_tokens=n, recent_tokens=0, first_tokens=0, start_tokens=0)`.
    """

    name = "combiner"
    needs_store = True
    entry_fields = (*ENTRY_FIELDS, "count")

    @property
    def num_summaries(self) -> int:
        return 1

    @property
    def num_sentinels_read(self) -> int:
        return 0

    @property
    def kind(self) -> str:
        return "pooled"

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, EntrySlots)
        return AttendPooled(chunk, store)


class AttendPooled(AttendOnCache):
    """Folded spans get an entry behind the tokens, which is their mean; `count` is how many tokens an entry is of."""

    always_masks = True

    def new_fields(self, entries: Entries) -> dict[str, Tensor]:
        return super().new_fields(entries) | {"count": torch.ones_like(self.row)}

    def with_summaries(self, chunk: Chunk, cached: Entries) -> Entries:
        self.means: list[tuple[int, Tensor, int]] = []
        assert chunk.span is not None or not chunk.has_events
        if not chunk.has_events:
            return cached
        rows, fields = [], []
        for row in range(len(cached.span)):
            for number in torch.unique(cached.span[row]).tolist():
                if number < 0:
                    continue
                members = (cached.span[row] == number).nonzero().squeeze(1)
                at = int(cached.until[row, members[0]])
                rows.append((row, members))
                fields.append((int(cached.position[row, members].max()), OPEN + 1, at + 1, FOREVER, len(members)))
        if not rows:
            return cached
        columns = torch.tensor(fields).T
        row_index = torch.tensor([row for row, _ in rows])
        slot = self.slots.extend_rows(
            row_index, dict(zip(("position", "order", "since", "until", "count"), columns, strict=True))
        )
        self.means = [(row, members, place) for (row, members), place in zip(rows, slot.tolist(), strict=True)]
        longest = self.slots.longest
        span = F.pad(cached.span, (0, longest - cached.span.shape[1]), value=-1)
        position, order, since, until, _ = self.slots.entries[:, :, :longest]
        return Entries(position=position, order=order, span=span, since=since, until=until)

    def see(self, cached: Entries) -> None:
        self.bias = OnDevices(self.slots.field("count")[:, : self.num_keys].clamp(min=1).double().log())

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        super().write(layer, key, value)
        for row, members, place in self.means:
            for written in (self.slots.keys[layer], self.slots.values[layer]):
                written[row, :, place] = written[row][:, members].mean(dim=1)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scale: float, original: Original
    ) -> Tensor:
        return original(query, keys, values, mask + self.bias.at(query.device).to(query.dtype)[:, None, None, :])

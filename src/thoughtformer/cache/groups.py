"""Layers that attend alike, and a store for each group of them: full attention, or a window of the last tokens.

A compression method acts on the layers that read the whole text. A layer with a window forgets by itself: it keeps what
is near, whatever a method drops elsewhere, and the tokens of a span until sentinels have read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.cache.entries import BLOCK_ENTRIES, ENTRY_FIELDS, EntrySlots, Store
from thoughtformer.cache.shape import KVShape
from thoughtformer.rules.entries import TOKEN, Entries, in_window
from thoughtformer.rules.schedule import RowReading

__all__ = ["GroupedStore", "LayerGroup", "WindowSlots"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that attend alike.

    Attributes:
        layers: their numbers, ascending.
        window: how many of the last tokens a token reads, itself included; None: all.
    """

    layers: tuple[int, ...]
    window: int | None = None


class WindowSlots(EntrySlots):
    """Slots of layers whose tokens read the last `window` tokens.

    Args:
        window: itself included.
        holds_spans: older tokens stay until they are dropped or folded, because sentinels have yet to read them.
    """

    def __init__(self, window: int, shape: KVShape, devices: Sequence[torch.device], *, holds_spans: bool) -> None:
        super().__init__(ENTRY_FIELDS, shape, devices, block_entries=BLOCK_ENTRIES)
        self.window = self._width = window
        self.holds_spans = holds_spans

    def seen(self, entries: Entries) -> Entries:
        return in_window(entries, self._width)

    def is_kept(self, entries: Entries, next_position: Int[Tensor, "rows 1"]) -> Bool[Tensor, "rows entries"]:
        is_near = entries.position + self._width > next_position
        awaits = (entries.until >= next_position) & self.holds_spans
        return (entries.order == TOKEN) & (is_near | awaits)


class GroupedStore(Store):
    """One store a group, behind one face. The first is the method's own, and says how long rows are."""

    def __init__(self, parts: Sequence[Store]) -> None:
        self.parts = list(parts)
        self.can_wait = self.parts[0].can_wait

    @property
    def lengths(self) -> Int[Tensor, " rows"]:  # type: ignore[override]  an attribute of stores that hold entries
        return self.parts[0].lengths

    def lengths_by_part(self) -> list[Int[Tensor, " rows"]]:
        return [lengths for part in self.parts for lengths in part.lengths_by_part()]

    def wait(self, waits: bool) -> None:
        for part in self.parts:
            part.wait(waits)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors()]

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        for part in self.parts:
            part.select(rows)

    def fork_rows(self, rows: Int[Tensor, " selected"]) -> GroupedStore:
        return GroupedStore([part.fork_rows(rows) for part in self.parts])

    def join(self, other: GroupedStore) -> None:
        for part, others in zip(self.parts, other.parts, strict=True):
            part.join(others)

    def clear(self) -> None:
        for part in self.parts:
            part.clear()

    def saved(self) -> dict[str, Tensor]:
        return {
            f"group.{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            for name, tensor in part.saved().items()
        }

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        for number, part in enumerate(self.parts):
            start = f"group.{number}."
            part.restore_saved({name.removeprefix(start): saved[name] for name in saved if name.startswith(start)})

    def snapshot(self, *, whole: bool) -> list[Any] | None:
        snapshots = [part.snapshot(whole=whole) for part in self.parts]
        return None if snapshots[0] is None else snapshots

    def restored(self, snapshot: Sequence[Any]) -> GroupedStore:
        return GroupedStore([part.restored(of) for part, of in zip(self.parts, snapshot, strict=True)])

    def counts(self, row: int) -> tuple[int, int]:
        return self.parts[0].counts(row)

    def check_positions(self, row: int, num_tokens: int) -> None:
        for part in self.parts:
            part.check_positions(row, num_tokens)

    def mark(self) -> list[Any]:
        return [part.mark() for part in self.parts]

    def back_to(self, mark: Sequence[Any]) -> None:
        for part, of in zip(self.parts, mark, strict=True):
            part.back_to(of)

    def commit(self, next_position: Int[Tensor, " rows"]) -> None:
        for part in self.parts:
            part.commit(next_position)

    def commit_first(self, mark: Sequence[Any], readings: Sequence[RowReading]) -> None:
        for part, of in zip(self.parts, mark, strict=True):
            part.commit_first(of, readings)

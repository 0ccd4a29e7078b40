"""What methods share that drop at intervals: every so many tokens, each head keeps its entries of most worth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeVar

from jaxtyping import Float
from torch import Tensor

from thoughtformer.checks import check_count
from thoughtformer.compression.by_head import ByHead
from thoughtformer.compression.in_pieces import AttendInPieces, Queries
from thoughtformer.compression.method import LayersShape
from thoughtformer.models.backbone import Original
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["AttendByInterval", "ByInterval"]

Kind = TypeVar("Kind", bound="ByInterval")


@dataclass(frozen=True, kw_only=True)
class ByInterval(ByHead):
    """Whenever a multiple of `every_tokens` is read, each head of a layer keeps its budget of entries.

    Up to `every_tokens` more are held in between. So a text that is read at once and one that is read token by token
    drop the same; with an interval as long as a prompt, the prompt is read in full and compressed at its end.

    Args:
        max_entries: that are kept, on average over the layers.
        every_tokens: between two choices.
        layers: that the method acts on; whoever compresses a model finds it.
    """

    found_settings = ("layers",)
    max_entries: int = 256
    every_tokens: int = 64
    layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_entries", self.max_entries, 2)
        check_count("every_tokens", self.every_tokens, 1)

    #: Choices are made at multiples of `every_tokens`.
    offset: ClassVar[int] = 0

    @property
    def kind(self) -> str:
        return f"at most {self.max_entries} + {self.every_tokens} a head"

    def budgets(self, num_layers: int) -> list[int]:
        """Entries that each layer keeps."""
        return [self.max_entries] * num_layers

    def bound(self: Kind, shape: LayersShape) -> Kind:
        return replace(self, layers=shape.kv.num_layers)

    def most_entries(self, num_layers: int) -> list[int]:
        return [budget + self.every_tokens for budget in self.budgets(num_layers)]

    @cached_property
    def _budgets(self) -> list[int]:
        return self.budgets(self.layers)

    def _entries(self, num_tokens: int) -> list[int]:
        last = num_tokens // self.every_tokens * self.every_tokens
        return [min(last, budget) + num_tokens - last for budget in self._budgets]

    def entries_after(self, num_tokens: int) -> int:
        return max(self._entries(num_tokens))

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        # Which tokens go is the heads' own affair; here only how many are held, on average over the layers.
        entries = self._entries(row.num_tokens)
        row.num_cached = -(-sum(entries) // len(entries))
        return ()


class AttendByInterval(AttendInPieces[Kind]):
    """A method says what entries are worth. A row's are in its first slots, in the order of the text."""

    @abstractmethod
    def see(self, layer: int, queries: Queries, weights: Float[Tensor, "batch kv_heads groups seq slots"]) -> None:
        """Notes what is to be known of a piece's queries in a layer, and of what they attend to."""

    @abstractmethod
    def worth(
        self, layer: int, row: int, num_entries: int, *, num_tokens: int, scale: float
    ) -> Float[Tensor, "kv_heads entries"]:
        """What each entry of a row in a layer is worth after so many tokens; infinite where it has to stay."""

    def forget(self, layer: int, row: int) -> None:
        """A row's choice has been made."""

    def read(
        self, layer: int, queries: Queries, keys: Tensor, values: Tensor, scale: float, original: Original
    ) -> Tensor:
        scores = (queries.states @ keys[:, :, None].mT) * scale
        weights = scores.masked_fill(~queries.reads[:, :, None], float("-inf")).softmax(dim=-1)
        self.see(layer, queries, weights.detach())
        return weights @ values[:, :, None]

    def change(self, layer: int, row: int, num_tokens: int, scale: float) -> None:
        # Of entries of equal worth the older stay.
        store, budget = self.store, self.method.budgets(len(self.store["keys"]))[layer]
        count = int(store.counts_in(layer)[row])
        if count > budget:
            worth = self.worth(layer, row, count, num_tokens=num_tokens, scale=scale)
            best = worth.argsort(dim=-1, descending=True, stable=True)[:, :budget]
            store.keep(layer, row, best.sort(dim=-1).values)
        self.forget(layer, row)

"""What methods share that drop at intervals: every so many tokens, each head keeps its entries of most worth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.checks import check_count
from thoughtformer.compression.by_head import AttendByHead, ByHead
from thoughtformer.compression.method import LayersShape
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["AttendByInterval", "ByInterval", "Queries"]

Kind = TypeVar("Kind", bound="ByInterval")


class Queries(NamedTuple):
    """Queries of a piece of text, what they attend to, and which of them are tokens.

    Attributes:
        states: rotated as the model rotates them.
        weights: over the slots of their head.
        position: of each in its row's text.
        is_token: the others are padding.
    """

    states: Float[Tensor, "batch kv_heads groups seq head_dim"]
    weights: Float[Tensor, "batch kv_heads groups seq slots"]
    position: Int[Tensor, "batch seq"]
    is_token: Bool[Tensor, "batch seq"]


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

    max_entries: int = 256
    every_tokens: int = 64
    layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_entries", self.max_entries, 2)
        check_count("every_tokens", self.every_tokens, 1)

    @property
    def kind(self) -> str:
        return f"at most {self.max_entries} + {self.every_tokens} a head"

    def budgets(self, num_layers: int) -> list[int]:
        """Entries that each layer keeps."""
        return [self.max_entries] * num_layers

    def bound(self: Kind, shape: LayersShape) -> Kind:
        return replace(self, layers=shape.num_layers)

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


class _Piece(NamedTuple):
    """Columns of a pass between two choices, and the rows that choose behind them, with their tokens by then."""

    columns: slice
    choosing: list[tuple[int, int]]


class AttendByInterval(AttendByHead[Kind]):
    """A piece between two choices at a time, in which nothing is dropped. A method says what entries are worth.

    A row's entries are in its first slots, in the order of the text.
    """

    @abstractmethod
    def see(self, layer: int, queries: Queries) -> None:
        """Notes what is to be known of a piece's queries in a layer."""

    @abstractmethod
    def worth(
        self, layer: int, row: int, num_entries: int, *, num_tokens: int, scale: float
    ) -> Float[Tensor, "kv_heads entries"]:
        """What each entry of a row in a layer is worth after so many tokens; infinite where it has to stay."""

    def forget(self, layer: int, row: int) -> None:
        """A row's choice has been made."""

    def begin(self, is_new: Bool[Tensor, "rows seq"]) -> None:
        super().begin(is_new)
        num_tokens = self.position.at(is_new.device).long() + 1
        chooses = is_new & (num_tokens % self.method.every_tokens == 0)
        cuts = chooses.any(dim=0).nonzero().squeeze(1).tolist()
        self.pieces, start = [], 0
        for cut in cuts:
            rows = chooses[:, cut].nonzero().squeeze(1).tolist()
            self.pieces.append(_Piece(slice(start, cut + 1), [(row, int(num_tokens[row, cut])) for row in rows]))
            start = cut + 1
        if start < is_new.shape[1]:
            self.pieces.append(_Piece(slice(start, is_new.shape[1]), []))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        store, output = self.store, torch.zeros_like(query)
        budget = self.method.budgets(len(store["keys"]))[layer]
        for columns, choosing in self.pieces:
            is_new = self.is_new.at(query.device)[:, columns]
            position = self.position.at(query.device)[:, columns]
            self._write(layer, key[:, :, columns], value[:, :, columns], position, is_new)
            keys, values, held = (store[name][layer] for name in ("keys", "values", "position"))
            reads = (held >= 0)[:, :, None] & (held[:, :, None] <= position[:, None, :, None])
            # A padded query reads all slots, so that it is a number.
            reads |= ~is_new[:, None, :, None]
            states = query[:, :, :, columns]
            scores = (states @ keys[:, :, None].mT) * scale
            weights = scores.masked_fill(~reads[:, :, None], float("-inf")).softmax(dim=-1)
            output[:, :, :, columns] = weights @ values[:, :, None]
            self.see(layer, Queries(states, weights, position, is_new))
            for row, num_tokens in choosing:
                self._choose(layer, row, budget, num_tokens, scale)
        return output

    def _write(
        self,
        layer: int,
        key: Float[Tensor, "rows kv_heads seq head_dim"],
        value: Float[Tensor, "rows kv_heads seq head_dim"],
        position: Int[Tensor, "rows seq"],
        is_new: Bool[Tensor, "rows seq"],
    ) -> None:
        """Puts what is new behind what is held."""
        store = self.store
        row, column = is_new.nonzero(as_tuple=True)
        slot = store.counts_in(layer)[row] + column  # rows are padded at their end
        store["keys"][layer][row, :, slot] = key[row, :, column]
        store["values"][layer][row, :, slot] = value[row, :, column]
        store["attention"][layer][row, :, slot] = 0
        store["position"][layer][row, :, slot] = position[row, column, None].to(torch.int32)

    def _choose(self, layer: int, row: int, budget: int, num_tokens: int, scale: float) -> None:
        """A row's heads keep their budget of a layer; of entries of equal worth, the older."""
        store = self.store
        count = int(store.counts_in(layer)[row])
        if count > budget:
            worth = self.worth(layer, row, count, num_tokens=num_tokens, scale=scale)
            best = worth.argsort(dim=-1, descending=True, stable=True)[:, :budget]
            store.keep(layer, row, best.sort(dim=-1).values)
        self.forget(layer, row)

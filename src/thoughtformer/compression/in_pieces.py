"""Passes over a `HeadStore` that changes at intervals: what lies between two changes is read at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries
from thoughtformer.compression.by_head import AttendByHead, ByHead
from thoughtformer.models.backbone import Original

__all__ = ["AttendInPieces", "Queries"]

Kind = TypeVar("Kind", bound=ByHead)


class Queries(NamedTuple):
    """Queries of a piece of text, what they may read, and which of them are tokens.

    Attributes:
        states: rotated as the model rotates them.
        position: of each in its row's text.
        is_token: the others are padding.
        reads: which entries each may read, by key head.
    """

    states: Float[Tensor, "batch kv_heads groups seq head_dim"]
    position: Int[Tensor, "batch seq"]
    is_token: Bool[Tensor, "batch seq"]
    reads: Bool[Tensor, "batch kv_heads seq entries"]


class _Piece(NamedTuple):
    """Columns of a pass between two changes, and the rows that change behind them, with their tokens by then."""

    columns: slice
    changing: list[tuple[int, int]]


class AttendInPieces(AttendByHead[Kind]):
    """A piece between two changes at a time.

    The method has `every_tokens` and `offset`: rows change when that many tokens more than a multiple were read. With
    a `window`, a token reads the last so many alone.
    """

    window: int | None = None

    def begin(self, is_new: Bool[Tensor, "rows seq"]) -> None:
        super().begin(is_new)
        method: Any = self.method
        num_tokens = self.position.at(is_new.device).long() + 1
        changes = is_new & (num_tokens >= method.offset) & ((num_tokens - method.offset) % method.every_tokens == 0)
        self.pieces, start = [], 0
        for cut in changes.any(dim=0).nonzero().squeeze(1).tolist():
            rows = changes[:, cut].nonzero().squeeze(1).tolist()
            self.pieces.append(_Piece(slice(start, cut + 1), [(row, int(num_tokens[row, cut])) for row in rows]))
            start = cut + 1
        if start < is_new.shape[1]:
            self.pieces.append(_Piece(slice(start, is_new.shape[1]), []))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, original: Original) -> Tensor:
        output = torch.zeros_like(query)
        for columns, changing in self.pieces:
            is_new = self.is_new.at(query.device)[:, columns]
            position = self.position.at(query.device)[:, columns]
            self._write(layer, key[:, :, columns], value[:, :, columns], position, is_new)
            states = query[:, :, :, columns]
            keys, values, held = self.entries(layer, states, scale)
            reads = (held >= 0)[:, :, None] & (held[:, :, None] <= position[:, None, :, None])
            if self.window is not None:
                reads &= held[:, :, None] > position[:, None, :, None] - self.window
            # A padded query reads all, so that it is a number.
            reads |= ~is_new[:, None, :, None]
            queries = Queries(states, position, is_new, reads)
            output[:, :, :, columns] = self.read(layer, queries, keys, values, scale, original)
            for row, num_tokens in changing:
                self.change(layer, row, num_tokens, scale)
        return output

    def entries(
        self, layer: int, states: Float[Tensor, "batch kv_heads groups seq head_dim"], scale: float
    ) -> BlockEntries:
        """What a piece's queries can read: keys, values and positions (-1: none) of a layer."""
        return self.store.entries(layer)

    @abstractmethod
    def read(
        self,
        layer: int,
        queries: Queries,
        keys: Float[Tensor, "batch kv_heads entries head_dim"],
        values: Float[Tensor, "batch kv_heads entries head_dim"],
        scale: float,
        original: Original,
    ) -> Float[Tensor, "batch kv_heads groups seq head_dim"]:
        """A piece's attention."""

    @abstractmethod
    def change(self, layer: int, row: int, num_tokens: int, scale: float) -> None:
        """Drops or moves entries of a row in a layer, after so many tokens."""

    def _write(
        self,
        layer: int,
        key: Float[Tensor, "rows kv_heads seq head_dim"],
        value: Float[Tensor, "rows kv_heads seq head_dim"],
        position: Int[Tensor, "rows seq"],
        is_new: Bool[Tensor, "rows seq"],
    ) -> None:
        """Puts what is new behind what is in a row's slots."""
        store = self.store
        row, column = is_new.nonzero(as_tuple=True)
        slot = store.counts_in(layer)[row] + column  # rows are padded at their end
        store["keys"][layer][row, :, slot] = key[row, :, column]
        store["values"][layer][row, :, slot] = value[row, :, column]
        store["position"][layer][row, :, slot] = position[row, column, None].to(torch.int32)

"""Attention matching (arXiv 2602.16284): fewer keys, with biases and values fitted to keep attention as it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore
from thoughtformer.checks import check_count
from thoughtformer.compression.method import PassAttention
from thoughtformer.compression.rereading import AttendAgain, Held, Rereading
from thoughtformer.errors import ConfigError
from thoughtformer.models.backbone import Backbone
from thoughtformer.rules.schedule import Chunk

__all__ = ["AttentionMatching"]


@dataclass(frozen=True, kw_only=True)
class AttentionMatching(Rereading):
    """Of a chunk, each head keeps some keys, and fits what they stand for to the queries of the second reading.

    Kept are the keys with the largest mean square of attention among the chunk's. Each gets a bias, which is added to
    its scores, so that the kept ones have the mass that all of the chunk had; and a value, so that what is read of
    them is what was read of all. Masses are fitted by least squares without negative weights, values by ridge
    regression.

    Args:
        steps: multiplicative updates of the weights, whose logarithms are the biases.
        ridge: of the values' regression, relative to the mean square of the weights.
    """

    name = "attention_matching"
    numbers = ("bias",)
    steps: int = 100
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps, 0)
        if not 0 < self.ridge < float("inf"):
            raise ConfigError(f"ridge={self.ridge} must be above 0.")

    @property
    def kind(self) -> str:
        return "fitted"

    def attend_again(self, chunk: Chunk, store: Store, *, backbone: Backbone) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendToFit(chunk, self, store)


class AttendToFit(AttendAgain[AttentionMatching]):
    """Fits head by head."""

    def keep(self, layer: int, row: int, held: Held, scale: float) -> Tensor:
        exact = self.store["bias"][layer].dtype
        queries = held.queries.flatten(1, 2).to(exact)
        scores = (queries @ held.keys.to(exact).mT) * scale
        best = self.best(scores.softmax(dim=-1).square().mean(dim=1))
        for head, chosen in enumerate(best):
            bias, values = self._fitted(scores[head], held.values[head].to(exact), chosen)
            self.store["bias"][layer][row, head, held.slots][chosen] = bias
            held.values[head][chosen] = values.to(held.values.dtype)
        return best

    def _fitted(
        self,
        scores: Float[Tensor, "queries entries"],
        values: Float[Tensor, "entries head_dim"],
        chosen: Tensor,
    ) -> tuple[Float[Tensor, " kept"], Float[Tensor, "kept head_dim"]]:
        """Biases and values of the chosen entries."""
        # Relative to each query's largest, so that none counts more than another.
        parts = (scores - scores.amax(dim=1, keepdim=True)).exp()
        mass, kept = parts.sum(dim=1), parts[:, chosen]
        # Lee and Seung's updates keep weights above 0, and never make the fit worse.
        weights, wanted, products = torch.ones_like(kept[0]), kept.T @ mass, kept.T @ kept
        tiny = torch.finfo(weights.dtype).tiny
        for _ in range(self.method.steps):
            weights = weights * wanted / (products @ weights).clamp(min=tiny)
        weights = weights.clamp(min=1e-6)
        shares = kept * weights
        shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=tiny)
        squares = shares.T @ shares
        ridge = self.method.ridge * squares.diagonal().mean()
        # Towards the values that the entries had.
        before = values[chosen]
        missing = (parts @ values) / mass[:, None] - shares @ before
        squares.diagonal().add_(ridge)
        return weights.log(), before + torch.linalg.solve(squares, shares.T @ missing)

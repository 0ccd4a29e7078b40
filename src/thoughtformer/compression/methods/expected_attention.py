"""Expected attention (Devoto et al., arXiv 2510.00636): what is kept is what queries like those seen will attend to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.heads import HeadStore
from thoughtformer.checks import check_count
from thoughtformer.compression.by_interval import AttendByInterval, ByInterval
from thoughtformer.compression.in_pieces import Queries
from thoughtformer.compression.method import LayersShape, PassAttention
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError, nearest
from thoughtformer.models.backbone import Backbone, Rotation
from thoughtformer.rules.schedule import Chunk

__all__ = ["ExpectedAttention"]

#: What is known of how queries vary.
COVARIANCES = ("diagonal", "full", "none")


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(ByInterval):
    """Keeps the entries with the largest expected share of attention, times the length of their value.

    Queries before their rotation count as drawn from a normal distribution, whose mean and covariance are those of
    all queries since `first_tokens`, by query head; rotations are averaged over the `future_tokens` positions to come.
    Then the expected exp(q k) has a closed form (equation 5), and a softmax over the entries gives shares, averaged
    over the query heads that share a key head.

    Args:
        first_tokens: that stay, and whose queries don't count.
        recent_tokens: the last ones, which stay.
        covariance: `full` as in the paper, which takes head_dim squared numbers a query head; `diagonal`; or `none`.
        query_heads, head_dim: of the model; whoever compresses it finds them.
    """

    name = "expected_attention"
    found_settings = ("layers", "query_heads", "head_dim")
    first_tokens: int = 4
    recent_tokens: int = 16
    future_tokens: int = 128
    covariance: str = "diagonal"
    query_heads: int = 1
    head_dim: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first_tokens", self.first_tokens, 0)
        check_count("recent_tokens", self.recent_tokens, 0)
        check_count("future_tokens", self.future_tokens, 1)
        if self.covariance not in COVARIANCES:
            raise ConfigError(f"covariance={self.covariance!r}.{nearest(self.covariance, COVARIANCES)}")
        if self.max_entries <= self.first_tokens + self.recent_tokens:
            raise ConfigError(
                f"max_entries={self.max_entries} leaves nothing beside first_tokens={self.first_tokens} and "
                f"recent_tokens={self.recent_tokens}, which always stay."
            )

    def bound(self, shape: LayersShape) -> ExpectedAttention:
        return replace(super().bound(shape), query_heads=shape.num_heads, head_dim=shape.kv.head_dim)

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        each = (self.query_heads, self.head_dim)
        spread = {"none": {}, "diagonal": {"squares": each}, "full": {"squares": (*each, self.head_dim)}}
        return {"num_queries": (1,), "sums": each} | spread[self.covariance]

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeadStore)
        return AttendExpected(chunk, self, store, backbone.rotation)

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[ExpectedAttention]:
        def make(entries: int) -> ExpectedAttention:
            fewer = max(1, entries // 4)
            return cls(
                max_entries=entries,
                every_tokens=min(64, fewer),
                first_tokens=min(4, fewer),
                recent_tokens=min(16, fewer),
            )

        yield search.crossing(make, search.budgets)


class AttendExpected(AttendByInterval[ExpectedAttention]):
    """Sums queries and their squares as they were before their rotation, which `turn` continues."""

    def __init__(self, chunk: Chunk, method: ExpectedAttention, store: HeadStore, turn: Rotation | None) -> None:
        self.turn = turn
        self._turns: dict[tuple[int, torch.device], Tensor] = {}
        super().__init__(chunk, method, store)

    def see(self, layer: int, queries: Queries, weights: Tensor) -> None:
        counts = queries.is_token & (queries.position >= self.method.first_tokens)
        states = queries.states.detach().flatten(1, 2)
        if self.turn is not None:
            states = self.turn(states, -queries.position.long())
        sums = self.store["sums"][layer]
        states = (states * counts[:, None, :, None]).to(sums.dtype)
        sums += states.sum(dim=2)
        self.store["num_queries"][layer] += counts.sum(dim=1, keepdim=True)
        if self.method.covariance == "diagonal":
            self.store["squares"][layer] += states.square().sum(dim=2)
        elif self.method.covariance == "full":
            self.store["squares"][layer] += states.mT @ states

    def worth(self, layer: int, row: int, num_entries: int, *, num_tokens: int, scale: float) -> Tensor:
        held, keys, values = (self.store[name][layer][row, :, :num_entries] for name in ("position", "keys", "values"))
        sums = self.store["sums"][layer][row]
        keys, count = keys.to(sums.dtype), self.store["num_queries"][layer][row].clamp(min=1)
        mean = sums / count
        # A query that is turned meets a key as the query meets the key turned back.
        keys = (keys @ self._mean_turn(num_tokens, keys).mT).repeat_interleave(len(sums) // len(keys), dim=0)
        scores = scale * torch.einsum("hed,hd->he", keys, mean)
        if self.method.covariance == "diagonal":
            variance = self.store["squares"][layer][row] / count - mean.square()
            scores += scale**2 / 2 * torch.einsum("hed,hd->he", keys.square(), variance)
        elif self.method.covariance == "full":
            covariance = self.store["squares"][layer][row] / count[:, None] - mean[:, :, None] * mean[:, None]
            scores += scale**2 / 2 * torch.einsum("hed,hdf,hef->he", keys, covariance, keys)
        shares = scores.softmax(dim=-1).view(len(values), -1, num_entries).mean(dim=1)
        stays = (held < self.method.first_tokens) | (held >= num_tokens - self.method.recent_tokens)
        return (shares * values.to(shares.dtype).norm(dim=-1)).masked_fill(stays, float("inf"))

    def _mean_turn(self, num_tokens: int, like: Tensor) -> Float[Tensor, "head_dim head_dim"]:
        """What a state becomes, as a row times this matrix, on average over the positions to come."""
        key = num_tokens, like.device
        if key not in self._turns:
            unit = torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)
            if self.turn is not None:
                positions = torch.arange(num_tokens, num_tokens + self.method.future_tokens, device=like.device)
                rows = unit.expand(len(positions), 1, -1, -1)
                unit = self.turn(rows, positions[:, None].expand(-1, len(unit))).mean(dim=0)[0]
            self._turns[key] = unit
        return self._turns[key]

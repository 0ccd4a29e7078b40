"""Methods of which each head drops tokens by what queries attend to: H2O, TOVA, SnapKV, expected attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thoughtformer.compression import TOVA, ExpectedAttention, HeavyHitters, SnapKV
from thoughtformer.models.backbone import backbone_of
from twins import MethodTwin, attended_by_hand


def h2o(model: Any, ids: Sequence[int], method: HeavyHitters, adapter: None) -> Tensor:
    """Algorithm 1 for each layer and key head, with lists."""
    kv_heads, recent = backbone_of(model).num_kv_heads, round(method.max_entries * method.recent_fraction)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[0] // kv_heads
        output = torch.zeros_like(query)
        for kv_head in range(kv_heads):
            held: list[int] = []
            gained: dict[int, float] = {}
            for j in range(len(ids)):
                if len(held) == method.max_entries:
                    older = [p for p in held if p <= j - 1 - recent]
                    held.remove(min(older, key=lambda p: (gained[p], p)))
                held.append(j)
                gained[j] = 0.0
                for head in range(kv_head * groups, (kv_head + 1) * groups):
                    weights = (query[head, j] @ key[head, held].mT).softmax(dim=-1)
                    output[head, j] = weights @ value[head, held]
                    for p, weight in zip(held, weights.tolist(), strict=True):
                        gained[p] += weight
        return output

    return attended_by_hand(model, ids, attend)


def tova(model: Any, ids: Sequence[int], method: TOVA, adapter: None) -> Tensor:
    """After a token, that which its heads attended to least, on average, is gone if there are too many."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        held: list[int] = []
        for j in range(len(ids)):
            held.append(j)
            weights = torch.einsum("hd,hkd->hk", query[:, j], key[:, held]).softmax(dim=-1)
            output[:, j] = torch.einsum("hk,hkd->hd", weights, value[:, held])
            if len(held) == method.max_entries:
                mean = weights.mean(dim=0).tolist()
                del held[mean.index(min(mean))]
        return output

    return attended_by_hand(model, ids, attend)


def chosen_at_intervals(
    model: Any,
    ids: Sequence[int],
    method: Any,
    budgets: Callable[[int], Sequence[int]],
    best: Callable[[list[int], Tensor, Tensor, Tensor, int], list[int]],
) -> Tensor:
    """Every so many tokens `best(held, queries, keys, values, budget)` of a key head says which positions it keeps.

    Queries are those of all its query heads up to now, (groups, tokens, width), scaled; keys and values are of all
    tokens up to now.
    """
    view = backbone_of(model)
    kv_heads, acted_on = view.num_kv_heads, view.groups[0].layers

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[0] // kv_heads
        output = torch.zeros_like(query)
        budget = budgets(len(acted_on))[acted_on.index(layer)]
        for kv_head in range(kv_heads):
            heads = slice(kv_head * groups, (kv_head + 1) * groups)
            held: list[int] = []
            for j in range(len(ids)):
                held.append(j)
                for head in range(kv_head * groups, (kv_head + 1) * groups):
                    weights = (query[head, j] @ key[head, held].mT).softmax(dim=-1)
                    output[head, j] = weights @ value[head, held]
                if (j + 1) % method.every_tokens == 0 and len(held) > budget:
                    first = heads.start
                    held = sorted(best(held, query[heads, : j + 1], key[first, : j + 1], value[first, : j + 1], budget))
        return output

    return attended_by_hand(model, ids, attend)


def snapkv(model: Any, ids: Sequence[int], method: SnapKV, adapter: None) -> Tensor:
    """The paper's listing 1: sum over the window's queries of softmax weights, pooled, and the best with the window."""

    def budgets(layers: int) -> list[int]:
        if layers == 1 or method.pyramid == 1:
            return [method.max_entries] * layers
        step = (method.pyramid - 1) / (layers - 1)
        parts = [method.pyramid - step * layer for layer in range(layers)]
        ends = [round(sum(parts[:n]) / sum(parts) * method.max_entries * layers) for n in range(layers + 1)]
        return [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]

    def best(held: list[int], query: Tensor, key: Tensor, value: Tensor, budget: int) -> list[int]:
        now, half = query.shape[1], method.pooled_entries // 2
        window = [p for p in held if p >= now - method.observed_tokens]
        prefix = [p for p in held if p not in window]
        votes = dict.fromkeys(prefix, 0.0)
        for head in range(query.shape[0]):
            for j in window:
                seen = [p for p in held if p <= j]
                for p, weight in zip(seen, (query[head, j] @ key[seen].mT).softmax(dim=-1).tolist(), strict=True):
                    if p in votes:
                        votes[p] += weight
        pooled = [
            sum(votes[p] for p in prefix[max(0, place - half) : place + half + 1]) / method.pooled_entries
            for place in range(len(prefix))
        ]
        order = sorted(range(len(prefix)), key=lambda place: (-pooled[place], place))
        return [*(prefix[place] for place in order[: budget - len(window)]), *window]

    return chosen_at_intervals(model, ids, method, budgets, best)


def expected_attention(model: Any, ids: Sequence[int], method: ExpectedAttention, adapter: None) -> Tensor:
    """Equation 5 with the moments of all queries, and rotations averaged over what comes."""
    turn = backbone_of(model).rotation

    def turned(states: Tensor, positions: Tensor) -> Tensor:
        return states if turn is None else turn(states[None, None], positions[None])[0, 0]

    def mean_turned(states: Tensor, first: int) -> Tensor:
        positions = range(first, first + method.future_tokens)
        return torch.stack([turned(states, torch.full((len(states),), p)) for p in positions]).mean(dim=0)

    def best(held: list[int], query: Tensor, key: Tensor, value: Tensor, budget: int) -> list[int]:
        now, first, recent = query.shape[1], method.first_tokens, method.recent_tokens
        shares = torch.zeros(len(held), dtype=query.dtype)
        for head in query:
            plain = turned(head[first:], -torch.arange(first, now))
            mean, covariance = plain.mean(dim=0), torch.cov(plain.T, correction=0)
            if method.covariance == "diagonal":
                covariance = covariance.diagonal().diag()
            elif method.covariance == "none":
                covariance = covariance * 0
            mean, covariance = mean_turned(mean[None], now)[0], mean_turned(mean_turned(covariance, now).T, now)
            scores = [key[p] @ mean + key[p] @ covariance @ key[p] / 2 for p in held]
            shares += torch.stack(scores).softmax(dim=0) / len(query)
        worth = {p: float(share * value[p].norm()) for p, share in zip(held, shares, strict=True)}
        stays = [p for p in held if p < first or p >= now - recent]
        others = sorted((p for p in held if p not in stays), key=lambda p: (-worth[p], p))
        return [*stays, *others[: budget - len(stays)]]

    return chosen_at_intervals(model, ids, method, lambda layers: [method.max_entries] * layers, best)


METHODS = {
    "h2o": MethodTwin(
        cases={"h2o": HeavyHitters(max_entries=14)},
        logits=h2o,
        served={"h2o": ("mistral", HeavyHitters(max_entries=40))},
    ),
    "tova": MethodTwin(
        cases={"tova": TOVA(max_entries=14)},
        logits=tova,
        served={"tova": ("gpt2", TOVA(max_entries=40))},
    ),
    "expected_attention": MethodTwin(
        cases={
            f"expected_attention_{covariance}": ExpectedAttention(
                max_entries=11, every_tokens=6, first_tokens=2, recent_tokens=3, future_tokens=5, covariance=covariance
            )
            for covariance in ("diagonal", "full", "none")
        },
        logits=expected_attention,
        served={"expected_attention": ("phi", ExpectedAttention(max_entries=40, every_tokens=16))},
    ),
    "snapkv": MethodTwin(
        cases={
            "snapkv": SnapKV(max_entries=12, every_tokens=7, observed_tokens=4, pooled_entries=3),
            "snapkv_pyramid": SnapKV(max_entries=10, every_tokens=5, observed_tokens=5, pyramid=1.8),
        },
        logits=snapkv,
        served={"snapkv": ("qwen3", SnapKV(max_entries=40, every_tokens=16, observed_tokens=8))},
    ),
}

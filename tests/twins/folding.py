"""Methods that fold spans: sentinels, and the Combiner's means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thoughtformer.compression import Combiner, EntryBudget, Policy, RemovedFraction, SentenceEnds, Sentinel
from twins import MethodTwin, attended_by_hand, masked, window_of


class Fold(NamedTuple):
    """Tokens `start` to `end`, both included; their summaries are read instead from the token after `at` on."""

    start: int
    end: int
    at: int


def folds(policy: Policy, num_tokens: int, num_summaries: int) -> Iterator[Fold]:
    """`RemovedFraction` in plain words: once too much is held, the oldest raw span goes, but none of the last ones."""
    assert isinstance(policy, RemovedFraction)
    start, held = policy.first_tokens, 0
    for at in range(num_tokens):
        held += 1
        while at + 1 >= policy.start_tokens and held + 1 > (1 - policy.removed) * (at + 2):
            end = start + policy.span_tokens - 1
            if end > at - policy.recent_tokens:
                break
            yield Fold(start, end, at)
            start, held = end + 1, held - policy.span_tokens + num_summaries


def folded_by_sentinels(
    model: Any, adapter: Any, ids: Sequence[int], spans: Sequence[Fold], see_earlier: bool = False
) -> Tensor:
    """The paper's sequence, sentinels right behind their span, and its mask entry by entry."""
    k = adapter.config.num_sentinels
    items: list[tuple[str, int, int, int | None]] = []  # kind, number, position, span
    closing = {span.end: number for number, span in enumerate(spans)}
    inside = {p: number for number, span in enumerate(spans) for p in range(span.start, span.end + 1)}
    for position in range(len(ids)):
        items.append(("token", position, position, inside.get(position)))
        if position in closing:
            number = closing[position]
            items.append(("CL", 0, max(spans[number].start - 1, 0), number))
            items += [("CR", i, position, number) for i in range(1, k + 1)]
    allowed = torch.zeros(len(items), len(items), dtype=torch.bool)
    near = torch.zeros_like(allowed)  # in layers with a window: raw tokens alone, and a sentinel's own span
    window = window_of(model, "sliding_attention")
    for i, (kind, number, position, span) in enumerate(items):
        for j, (key_kind, key_number, key_position, key_span) in enumerate(items):
            if i == j:
                seen = True
            elif kind == "CL":
                seen = False
            elif kind == "CR":
                assert span is not None
                seen = key_span == span and (key_kind in ("token", "CL") or key_number < number)
                if see_earlier and key_kind == "CR" and key_span != span:
                    assert key_span is not None
                    seen = (spans[key_span].at, key_span) < (spans[span].at, span)
            elif key_kind == "CL" or key_position > position or (key_kind == "token" and key_number > number):
                seen = False
            elif key_span is None:
                seen = True
            else:
                is_raw = position <= spans[key_span].at
                seen = is_raw if key_kind == "token" else not is_raw
            allowed[i, j] = seen
            if kind == "token":
                near[i, j] = window is not None and key_kind == "token" and 0 <= number - key_number < window
            else:
                near[i, j] = seen and (i == j or key_span == span)
    token_ids = torch.tensor([ids[number] if kind == "token" else 0 for kind, number, *_ in items])
    embeddings = model.get_input_embeddings()(token_ids).clone()
    for i, (kind, number, *_) in enumerate(items):
        if kind != "token":
            embeddings[i] = adapter.rows[0 if kind == "CL" else number]
    positions = torch.tensor([position for _, _, position, _ in items])
    logits = masked(model, embeddings, positions, allowed, near)
    return logits[[i for i, item in enumerate(items) if item[0] == "token"]]


def sentinel(model: Any, ids: Sequence[int], method: Sentinel, adapter: Any) -> Tensor:
    spans = list(folds(method.policy, len(ids), method.num_sentinels))
    return folded_by_sentinels(model, adapter, ids, spans, method.see_earlier)


def folded_into_means(model: Any, ids: Sequence[int], spans: Sequence[Fold]) -> Tensor:
    """A span's mean key and mean value, weighed as many."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        for j in range(len(ids)):
            folded = [span for span in spans if span.at < j]
            raw = [p for p in range(j + 1) if not any(span.start <= p <= span.end for span in folded)]
            keys, values, bias = [key[:, p] for p in raw], [value[:, p] for p in raw], [0.0] * len(raw)
            for start, end, _ in folded:
                keys.append(key[:, start : end + 1].mean(dim=1))
                values.append(value[:, start : end + 1].mean(dim=1))
                bias.append(log(end - start + 1))
            scores = torch.einsum("hd,khd->hk", query[:, j], torch.stack(keys)) + torch.tensor(bias, dtype=query.dtype)
            output[:, j] = torch.einsum("hk,khd->hd", scores.softmax(dim=-1), torch.stack(values))
        return output

    return attended_by_hand(model, ids, attend)


def combiner(model: Any, ids: Sequence[int], method: Combiner, adapter: None) -> Tensor:
    return folded_into_means(model, ids, list(folds(method.policy, len(ids), 1)))


def policy(**settings: Any) -> RemovedFraction:
    """Folds spans of 5 tokens soon."""
    defaults = {"removed": 0.6, "span_tokens": 5, "first_tokens": 2, "recent_tokens": 3, "start_tokens": 8}
    return RemovedFraction(**(defaults | settings))


_SENTENCES = SentenceEnds(end_ids=frozenset(range(5, 40)), recent_tokens=3, start_tokens=9)
METHODS = {
    "combiner": MethodTwin(
        cases={"combiner": Combiner(policy=policy())},
        logits=combiner,
        served={"combiner": ("qwen3", Combiner(policy=policy()))},
    ),
    "sentinel": MethodTwin(
        cases={
            "sentinel": Sentinel(policy=policy()),
            "sentinel_k4": Sentinel(policy=policy(span_tokens=9), num_sentinels=4),
            "sentinel_earlier": Sentinel(policy=policy(), num_sentinels=2, see_earlier=True),
            "sentinel_lag0": Sentinel(policy=policy(removed=0.9, recent_tokens=0, first_tokens=0, start_tokens=0)),
            "sentinel_lag16": Sentinel(policy=policy(removed=0.9, recent_tokens=16)),
        },
        logits=sentinel,
        served={
            "sentinel_plain": ("plain", Sentinel(policy=policy())),
            "sentinel_windows": ("gemma3_text", Sentinel(policy=policy())),
            "sentinel_sentences": ("llama", Sentinel(policy=_SENTENCES, num_sentinels=2)),
            "sentinel_budget": ("gpt2", Sentinel(policy=EntryBudget(max_entries=250, span_tokens=7, recent_tokens=3))),
        },
    ),
}

"""The rules of sentences, as their papers say them."""

from __future__ import annotations

from collections.abc import Sequence

from twins import Place, RuleTwin


def causal(text: Sequence[Place], i: int, j: int) -> bool:
    return True


def fast(text: Sequence[Place], i: int, j: int) -> bool:
    return i == j or text[j].is_end


def keep_last(text: Sequence[Place], i: int, j: int) -> bool:
    return text[j].is_end or text[j].sentence == text[i].sentence


def hybrid(text: Sequence[Place], i: int, j: int) -> bool:
    return i == j or text[j].is_end or (not text[i].is_end and text[j].sentence == text[i].sentence)


RULES = {
    "fast": RuleTwin(reads=fast),
    "keep_last": RuleTwin(reads=keep_last),
    "hybrid": RuleTwin(reads=hybrid),
    "causal": RuleTwin(reads=causal),
}

"""Which spans of a training row are folded, and when: by a policy as in use, or anywhere with an exact ratio."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thoughtformer.checks import check_count, check_fraction
from thoughtformer.compression.method import read_ids
from thoughtformer.compression.methods.sentinel import Sentinel
from thoughtformer.compression.policies import EveryTokens, Policy, RemovedFraction
from thoughtformer.errors import ConfigError
from thoughtformer.rules.schedule import Event, RowProgress, RowReading

__all__ = ["FoldedRow", "FoldingSettings", "fold_row", "random_spans"]


@dataclass(frozen=True, kw_only=True)
class FoldingSettings:
    """How training rows are folded; each row draws its own.

    Args:
        min_removed, max_removed: the fraction removed, uniform between these.
        min_span_tokens, max_span_tokens: longest span of a row, log-uniform between these.
        max_lag_tokens: tokens between a span and its folding; 0 in a third of the rows, else log-uniform up to this.
        every_fraction: part of the rows in which every span is folded as soon as its lag is over (`EveryTokens`),
            whatever that removes: most has to be learned from these.
        policy_fraction: part of the rows that are folded as in use, oldest spans first (`RemovedFraction`); in what
            is left spans lie anywhere.
        first_tokens: that stay raw in rows folded as in use.
    """

    min_removed: float = 0.0
    max_removed: float = 0.95
    min_span_tokens: int = 4
    max_span_tokens: int = 48
    max_lag_tokens: int = 128
    every_fraction: float = 0.5
    policy_fraction: float = 0.3
    first_tokens: int = 4

    def __post_init__(self) -> None:
        for name in ("min_removed", "max_removed"):
            check_fraction(name, getattr(self, name))
        for name in ("every_fraction", "policy_fraction"):
            check_fraction(name, getattr(self, name), below_one=False)
        if self.every_fraction + self.policy_fraction > 1:
            raise ConfigError(
                f"every_fraction={self.every_fraction} and policy_fraction={self.policy_fraction} are parts of one."
            )
        check_count("min_span_tokens", self.min_span_tokens, 2)
        check_count("max_span_tokens", self.max_span_tokens, self.min_span_tokens)
        check_count("max_lag_tokens", self.max_lag_tokens, 0)
        check_count("first_tokens", self.first_tokens, 0)
        if self.min_removed > self.max_removed:
            raise ConfigError(f"min_removed={self.min_removed} is above max_removed={self.max_removed}.")


@dataclass(frozen=True, kw_only=True)
class FoldedRow:
    """A row's reading, with the fractions removed: asked for, reached at the row's end, and on average."""

    reading: RowReading
    nominal: float
    achieved: float
    average: float


def random_spans(
    num_tokens: int, num_removed: int, max_span_tokens: int, num_summaries: int, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Spans (start, end), end included, whose folding removes exactly `num_removed` entries, anywhere in the text.

    As few spans as reach it at `max_span_tokens` each, of random lengths that add up, with random gaps between them.

    Raises:
        ConfigError: so much can't be removed.
    """
    if num_removed == 0:
        return []
    most = max_span_tokens - num_summaries
    if most < 1:
        raise ConfigError(f"spans of {max_span_tokens} tokens are not shortened by {num_summaries} summaries.")
    num_spans = -(-num_removed // most)
    covered = num_removed + num_spans * num_summaries
    if covered > num_tokens:
        raise ConfigError(
            f"{num_removed} of {num_tokens} entries can't be removed by spans of at most {max_span_tokens} tokens with "
            f"{num_summaries} summaries: they would cover {covered} tokens. Ask for less, or for longer spans."
        )
    # Each span removes from 1 to `most`; the slack below `most` is spread at random.
    removed = np.full(num_spans, most)
    for _ in range(num_spans * most - num_removed):
        choices = np.flatnonzero(removed > 1)
        removed[generator.choice(choices)] -= 1
    generator.shuffle(removed)
    gaps = np.diff(np.sort(generator.integers(0, num_tokens - covered + 1, num_spans)), prepend=0)
    spans, position = [], 0
    for gap, length in zip(gaps, removed + num_summaries, strict=True):
        position += int(gap)
        spans.append((position, position + int(length) - 1))
        position += int(length)
    return spans


def _log_uniform(low: int, high: int, generator: np.random.Generator) -> int:
    return round(float(np.exp(generator.uniform(np.log(low), np.log(high)))))


def fold_row(
    ids: list[int], settings: FoldingSettings, num_summaries: int, generator: np.random.Generator
) -> FoldedRow:
    """One row's ids with spans folded as the settings draw them."""
    num_tokens = len(ids)
    removed = float(generator.uniform(settings.min_removed, settings.max_removed))
    drawn_span = max(_log_uniform(settings.min_span_tokens, settings.max_span_tokens, generator), num_summaries + 1)
    # Spans must be long enough for the ratio, with some tokens to spare.
    least = int(np.ceil(num_summaries / max(1 - removed, 0.02) * 1.15)) + 1
    span = max(drawn_span, least)
    lag = 0
    if settings.max_lag_tokens and generator.uniform() > 1 / 3:
        lag = _log_uniform(1, settings.max_lag_tokens, generator)
    kind = generator.uniform()
    raw = {
        "first_tokens": settings.first_tokens,
        "recent_tokens": lag,
        "start_tokens": int(generator.integers(0, 65)),
    }
    if kind < settings.every_fraction + settings.policy_fraction:
        policy: Policy
        if kind < settings.every_fraction:
            policy = EveryTokens(span_tokens=drawn_span, **raw)
            nominal = 1 - num_summaries / drawn_span
        else:
            policy, nominal = RemovedFraction(removed=removed, span_tokens=span, **raw), removed
        reading = read_ids(Sentinel(policy=policy, num_sentinels=num_summaries), RowProgress(), ids)
    else:
        nominal = removed
        reading = RowReading(ids, 0, _anywhere(num_tokens, removed, span, lag, num_summaries, generator))
    change = np.zeros(num_tokens + 1)
    for event in reading.events:
        change[event.at + 1] -= event.end - event.start + 1 - num_summaries
    cached = np.arange(1, num_tokens + 2) + change.cumsum()
    return FoldedRow(
        reading=reading,
        nominal=nominal,
        achieved=1 - (cached[-1] - 1) / num_tokens,
        average=1 - cached[:-1].sum() / np.arange(1, num_tokens + 1).sum(),
    )


def _anywhere(
    num_tokens: int, removed: float, span: int, lag: int, num_summaries: int, generator: np.random.Generator
) -> list[Event]:
    # A span whose lag would end behind the row is never folded in it: spans lie before.
    region = max(num_tokens - lag, 0)
    num_removed = int(removed * num_tokens)
    most = span - num_summaries
    # What fits: m spans remove at most m * most and cover num_summaries more each.
    num_removed = min(num_removed, region * most // span)
    while num_removed and num_removed + -(-num_removed // most) * num_summaries > region:
        num_removed -= 1
    spans = random_spans(region, num_removed, span, num_summaries, generator)
    return [Event(start, end, min(end + lag, num_tokens - 1), True) for start, end in spans]

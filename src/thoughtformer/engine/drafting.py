"""Whom a step drafts for, and how much: proposals cut to what can be verified, and to what pays."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from thoughtformer.cache.rows import RowsCache
from thoughtformer.decode import Drafter, StepCosts
from thoughtformer.decode.budget import TIMES, WIDTHS, RowCosts, allotted
from thoughtformer.decode.drafting import verifiable
from thoughtformer.engine.request import Request
from thoughtformer.runners.base import Runner

__all__ = ["DraftCounts", "Drafting"]

logger = logging.getLogger(__name__)

#: Characters of a prediction for each token that may be written; what is cut off costs drafts, and nothing else.
PREDICTED_CHARACTERS = 16
#: Up to which what all rows hold is copied, for a moment, to time passes: limits on memory know nothing of it.
COPIED_BYTES = 1 << 28


@dataclass(kw_only=True)
class DraftCounts:
    """What came of drafts: by strategy, tokens that were verified, and those of them that were chosen; steps, and steps
    with any."""

    verified: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    drafted_steps: int = 0

    def copy(self) -> DraftCounts:
        """As they are now."""
        return DraftCounts(
            verified=Counter(self.verified),
            right=Counter(self.right),
            steps=self.steps,
            drafted_steps=self.drafted_steps,
        )


@dataclass(kw_only=True)
class _Offer:
    """What a strategy offers one request: a draft, or what one would be worth."""

    by: str = ""
    ids: Sequence[int] | None = None  # None: not drafted yet
    survival: Sequence[float] = ()
    seconds: float = 0.0


class Drafting:
    """Drafters at work for the requests of a batch; for each request and step, the one that promises most.

    Args:
        runner: the model.
        drafters: what proposes.
        costs: of a step, by which it is decided how much of what is proposed pays; None: all of it is verified.

    Raises:
        UnsupportedError: one can't draft for this model.
    """

    def __init__(self, runner: Runner, drafters: Sequence[Drafter], costs: StepCosts | None = None) -> None:
        self.runner = runner
        self.drafters: dict[str, Drafter] = {}
        for drafter in drafters:
            name = drafter.name or type(drafter).__name__
            name = name if name not in self.drafters else f"{name} {len(self.drafters) + 1}"
            self.drafters[name] = drafter.bound(runner)
        self.costs = costs
        self.counts = DraftCounts()

    def prepare(self, requests: Sequence[Request]) -> None:
        """Reads what they predict; in the thread that submits them, so that nobody's step waits for it."""
        known: dict[str, list[int]] = {}
        for request in requests:
            text = request.params.prediction[: PREDICTED_CHARACTERS * request.params.max_new_tokens]
            if text and request.takes_drafts:
                if text not in known:
                    known[text] = self.runner.encode(text, start=False)
                request.prediction = known[text]

    def drafts(self, requests: Sequence[Request], cache: RowsCache) -> list[list[int]]:
        """What to verify behind each request's ids."""
        offers = [self._offers(request) for request in requests]
        costs = None
        if self.costs is not None and any(offer.survival for of_one in offers for offer in of_one):
            costs = self.costs.of(len(requests))
            if not costs.is_tried:
                self._measure(costs, requests, cache)
        best = [self._best(of_one, costs) for of_one in offers]
        chosen = self._allotted(best, costs)
        has_drafted = False
        for request, offer, number in zip(requests, best, chosen, strict=True):
            if offer.ids is None:
                has_drafted |= number > 0
                offer.ids, offer.survival, offer.seconds = *self._proposed(request, offer, number), 0.0
        if has_drafted:
            chosen = self._allotted(best, costs)  # now that it is known how likely these are
        for request, offer in zip(requests, best, strict=True):
            request.drafted_by = offer.by
        drafts = [list((offer.ids or ())[:number]) for offer, number in zip(best, chosen, strict=True)]
        self.counts.steps += 1
        self.counts.drafted_steps += any(chosen)
        return drafts

    def observe(self, request: Request, num_verified: int, num_right: int) -> None:
        """What came of a request's draft; behind those that were right, one more token has been chosen."""
        request.num_drafted += num_verified
        request.num_right += num_right
        if num_verified:
            self.counts.verified[request.drafted_by] += num_verified
            self.counts.right[request.drafted_by] += num_right
        for name, drafter in list((request.drafters or {}).items()):
            of_it = (num_verified, num_right) if name == request.drafted_by else (0, 0)
            try:
                drafter.observe(*of_it, num_right + 1)
            except Exception:
                self._give_up(request, name)

    def took(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A step has been taken."""
        if self.costs is not None:
            self.costs.of(num_rows).add(num_tokens, seconds)

    def ended(self, request: Request) -> None:
        """A request has come to its end."""
        for name, drafter in list((request.drafters or {}).items()):
            if request.has_ended_itself:
                try:
                    drafter.finish(request.ids)
                except Exception:
                    self._give_up(request, name)
        request.drafters = None

    def _offers(self, request: Request) -> list[_Offer]:
        """What is offered behind a request's ids."""
        # The token behind the draft is chosen, too. Who wants to be told of each token's context gets one at a time.
        most = request.most_tokens - len(request.ids) - 1
        if most < 1 or not request.takes_drafts or request.follower is not None:
            return []
        if request.drafters is None:
            request.drafters = {}
            for name, drafter in self.drafters.items():
                try:
                    request.drafters[name] = drafter.begin(
                        client=request.client, prediction=request.prediction, guess=request.sampler.guess
                    )
                except Exception:
                    self._give_up(request, name)
        offers = []
        for name, drafter in list(request.drafters.items()):
            offer = _Offer(by=name)
            try:
                forecast = drafter.forecast(request.ids, most)
                if forecast is not None:
                    offer.survival, offer.seconds = forecast.survival[:most], forecast.seconds
            except Exception:
                self._give_up(request, name)
                continue
            if forecast is None:
                offer.ids, offer.survival = self._proposed(request, offer, most)
            offers.append(offer)
        return offers

    def _best(self, offers: Sequence[_Offer], costs: RowCosts | None) -> _Offer:
        """The offer that alone would yield the most tokens a second; without costs, the most tokens."""

        def worth(offer: _Offer) -> float:
            if costs is None or not costs.is_measured:
                return sum(offer.survival)
            (number,) = allotted([offer.survival], costs.seconds, [offer.seconds])
            seconds = costs.seconds(1 + number) + number * offer.seconds
            return (1 + sum(offer.survival[:number])) / seconds if seconds else 0.0

        return max(offers, key=worth, default=_Offer(ids=()))

    def _allotted(self, offers: Sequence[_Offer], costs: RowCosts | None) -> list[int]:
        """How much of each offer to take."""
        survivals = [offer.survival for offer in offers]
        if self.costs is None:
            return [len(survival) for survival in survivals]
        if costs is None or not costs.is_measured:
            return [0] * len(offers)
        return allotted(survivals, costs.seconds, [offer.seconds for offer in offers])

    def _proposed(self, request: Request, offer: _Offer, most: int) -> tuple[Sequence[int], Sequence[float]]:
        """What a drafter proposes behind a request's ids, as far as it can be verified."""
        drafter = (request.drafters or {}).get(offer.by)
        if not most or drafter is None:
            return (), ()
        ends = (*self.runner.end_ids, *self.runner.start_ids)
        try:
            proposed = drafter.propose(request.ids, most)
            return verifiable(proposed, most, vocab_size=self.runner.vocab_size, ends=ends)
        except Exception:  # what isn't made of whole numbers, too
            self._give_up(request, offer.by)
            return (), ()

    def _give_up(self, request: Request, name: str) -> None:
        """No request fails for a draft's sake."""
        (request.drafters or {}).pop(name, None)
        logger.warning("%s drafts no more for request %d", name, request.number, exc_info=True)

    def _measure(self, costs: RowCosts, requests: Sequence[Request], cache: RowsCache) -> None:
        """Times passes on a copy of all rows; of one of them, where a copy of all is large."""
        try:
            costs.is_tried = True
            runner, rows = self.runner, len(requests)
            special = {*runner.end_ids, *runner.start_ids, runner.sentence_end}
            longest = max(requests, key=lambda request: len(request.ids))
            token = next((token for token in reversed(longest.ids) if token not in special), None)
            room = len(longest.ids) + max(WIDTHS) + TIMES * len(WIDTHS)
            if token is None or (runner.max_tokens is not None and room > runner.max_tokens):
                costs.is_tried = False
                return
            copied = rows if cache.num_bytes() <= COPIED_BYTES else 1
            copy = cache.fork_rows(torch.arange(copied))
            copy.reserve(room)

            def seconds_of(width: int) -> float:
                # What is drafted is spread over the rows, and of each row the first token stays, as in a step.
                each, more = divmod(width, copied)
                new = [[token] * (each + (row < more)) for row in range(copied)]
                copy.autocommit = width == copied
                started = time.perf_counter()
                runner.verify(new, copy).argmax(-1).tolist()
                if not copy.autocommit:
                    copy.commit(torch.ones(copied, dtype=torch.long))
                return time.perf_counter() - started

            costs.measure(seconds_of, rows)
        except Exception:
            logger.warning("nothing is drafted for %d rows: steps can't be timed", len(requests), exc_info=True)

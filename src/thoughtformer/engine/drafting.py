"""Whom a step drafts for, and how much: proposals cut to what can be verified, and to what pays."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import torch

from thoughtformer.cache.rows import RowsCache
from thoughtformer.decode import Draft, Drafter, StepCosts
from thoughtformer.decode.budget import WIDTHS, allotted
from thoughtformer.engine.request import Request
from thoughtformer.runners.base import Runner

__all__ = ["DraftCounts", "Drafting"]

logger = logging.getLogger(__name__)

#: Characters of a prediction for each token that may be written; what is cut off costs drafts, and nothing else.
PREDICTED_CHARACTERS = 16


@dataclass(kw_only=True)
class DraftCounts:
    """What came of drafts: tokens that were verified, and those of them that were chosen; steps, and steps with any."""

    verified: int = 0
    right: int = 0
    steps: int = 0
    drafted_steps: int = 0


class Drafting:
    """One drafter at work for the requests of a batch.

    Args:
        runner: the model.
        drafter: what proposes.
        costs: of a step, by which it is decided how much of what is proposed pays; None: all of it is verified.
    """

    def __init__(self, runner: Runner, drafter: Drafter, costs: StepCosts | None = None) -> None:
        self.runner = runner
        self.drafter = drafter
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
        proposed = [self._proposed(request) for request in requests]
        survivals = [draft.survival for draft in proposed]
        chosen = [len(draft.ids) for draft in proposed]
        if self.costs is not None and any(chosen):
            if not self.costs.is_measured:
                try:
                    self._measure(self.costs, requests[0], cache)
                except Exception:  # no request fails for a draft's sake
                    logger.warning("nothing is drafted: steps can't be timed", exc_info=True)
                    for request in requests:
                        request.takes_drafts = False
            chosen = allotted(survivals, self.costs.seconds) if self.costs.is_measured else [0] * len(requests)
        drafts = [list(draft.ids[:number]) for draft, number in zip(proposed, chosen, strict=True)]
        self.counts.steps += 1
        self.counts.drafted_steps += any(chosen)
        return drafts

    def observe(self, request: Request, num_verified: int, num_right: int) -> None:
        """What came of a request's draft."""
        request.num_drafted += num_verified
        request.num_right += num_right
        self.counts.verified += num_verified
        self.counts.right += num_right
        if request.takes_drafts and request.drafter is not None:
            try:
                request.drafter.observe(num_verified, num_right)
            except Exception:
                self._give_up(request)

    def took(self, num_tokens: int, seconds: float) -> None:
        """A step has been taken."""
        if self.costs is not None:
            self.costs.add(num_tokens, seconds)

    def ended(self, request: Request) -> None:
        """A request has come to its end."""
        if request.drafter is not None and request.takes_drafts and request.has_ended_itself:
            try:
                request.drafter.finish(request.ids)
            except Exception:
                self._give_up(request)
        request.drafter = None

    def _proposed(self, request: Request) -> Draft:
        """What is proposed behind a request's ids, as far as it can be verified."""
        none = Draft(ids=(), survival=())
        # The token behind the draft is chosen, too. Who wants to be told of each token's context gets one at a time.
        most = request.most_tokens - len(request.ids) - 1
        if most < 1 or not request.takes_drafts or request.follower is not None:
            return none
        ends, size = (*self.runner.end_ids, *self.runner.start_ids), self.runner.vocab_size
        try:
            if request.drafter is None:
                request.drafter = self.drafter.begin(client=request.client, prediction=request.prediction)
            draft = request.drafter.propose(request.ids, most)
            ids, survival = (draft.ids, draft.survival) if isinstance(draft, Draft) else (draft, None)
            whole = [operator.index(token) for token in islice(ids, most)]
            left = list(takewhile(lambda token: 0 <= token < size and token not in ends, whole))
            likely = [1.0] * len(left) if survival is None else [float(survival[place]) for place in range(len(left))]
            return Draft(ids=left, survival=likely)
        except Exception:  # what isn't made of whole numbers, too
            self._give_up(request)
            return none

    def _give_up(self, request: Request) -> None:
        request.takes_drafts = False
        logger.warning("nothing is drafted any more for request %d", request.number, exc_info=True)

    def _measure(self, costs: StepCosts, request: Request, cache: RowsCache) -> None:
        """Times passes of the first row, on a copy: what they read is taken back."""
        runner, ids = self.runner, request.ids
        special = {*runner.end_ids, *runner.start_ids, runner.sentence_end}
        token = next((token for token in reversed(ids) if token not in special), None)
        room = max(WIDTHS) + len(ids)
        if token is None or (runner.max_tokens is not None and room > runner.max_tokens):
            return
        copy = cache.fork_rows(torch.tensor([0]))
        copy.reserve(room)

        def seconds_of(width: int) -> float:
            copy.autocommit = False
            started = time.perf_counter()
            runner.verify([[token] * width], copy).argmax(-1).tolist()
            seconds = time.perf_counter() - started
            copy.rollback()
            return seconds

        costs.measure(seconds_of)

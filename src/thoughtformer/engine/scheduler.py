"""Continuous batching: requests join the running batch and leave it at any step, under limits.

A round drops what was cancelled or is late, takes one step with all requests, admits who fits, and reads some of their
prompts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from thoughtformer.cache.rows import RowsCache
from thoughtformer.decode import Drafter, StepCosts
from thoughtformer.engine.admission import Admission, Limits
from thoughtformer.engine.batch import Batch
from thoughtformer.engine.drafting import DraftCounts, Drafting
from thoughtformer.engine.request import Completion, Request, StreamEvent, make_request
from thoughtformer.errors import StoppedError, UnsupportedError
from thoughtformer.runners.base import Runner
from thoughtformer.sampling import FinishReason, SamplingParams

__all__ = ["Scheduler", "SchedulerStats"]


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """Where a scheduler stands, and what it has done; for metrics."""

    waiting: int
    reading: int
    running: int
    cache_bytes: int
    rounds: int
    prompt_tokens: int
    cached_prompt_tokens: int
    new_tokens: int
    finished: dict[FinishReason, int]
    drafts: DraftCounts


class Scheduler:
    """The generation loop of any number of requests.

    `submit`, `cancel` and `stats` may be called from any thread; `round` from one.

    Args:
        runner: the model; see `runner_of`.
        limits: what is taken on.
        drafters: propose tokens, which are verified together; none: one token a step.
        costs: of a step, by which it is decided how much of what is proposed pays; None: all of it is verified.

    Raises:
        UnsupportedError: several rows, or drafts, of a method that can't have them, as those that read twice; a drafter
            that can't draft for this model.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits = Limits(),
        *,
        drafters: Sequence[Drafter] = (),
        costs: StepCosts | None = None,
    ) -> None:
        if not runner.can_join and limits.max_rows > 1:
            raise UnsupportedError(
                f"the method {runner.model.method.name!r} can't be batched continuously, because its rows can't be "
                "joined: choose another, or write one request at a time (max_rows=1; command line: --max-rows 1)."
            )
        if drafters and not runner.can_speculate:
            raise UnsupportedError(
                f"the method {runner.model.method.name!r} overwrites what it drops, so that no draft can be taken "
                "back: leave drafts off."
            )
        self.runner = runner
        self.limits = limits
        self.drafting = Drafting(runner, drafters, costs) if drafters else None
        self.batch = Batch(runner, self.drafting)
        self.admission = Admission(runner, limits)
        self._reading: list[Request] = []
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._next_number = 0
        self.is_closed = False
        self._rounds = self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._finished: dict[FinishReason, int] = {}

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        client: str = "",
        deadline_seconds: float | None = None,
        on_event: Callable[[StreamEvent], None] | None = None,
    ) -> Request:
        """Takes on a request; what comes of it is told to `on_event`, in the thread that runs the rounds.

        Args:
            prompt: text, or token ids that start with the end-of-text token.
            params: default: greedy.
            client: whose request it is; clients take turns.
            deadline_seconds: from now; it ends then with `finish_reason="deadline"`, wherever it stands.
            on_event: must not raise, and return soon.

        Raises:
            InputError, ContextOverflowError: a prompt that can't be; see `make_request`.
            TooLargeError: it would never fit `max_bytes`.
            OverloadedError: `max_waiting` requests wait already.
            StoppedError: nothing is worked on any more.
        """
        request = self.prepare(prompt, params or SamplingParams())
        request.client, request.on_event = client, on_event
        if deadline_seconds is not None:
            request.deadline = time.monotonic() + deadline_seconds
        self.enqueue([request])
        return request

    def prepare(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        """A request to `enqueue`; arguments and errors as in `submit`."""
        return make_request(self.runner, prompt, params, number=self.next_number())

    def enqueue(self, requests: Sequence[Request]) -> None:
        """Takes on all of them, or none; raises as `submit` does."""
        self.admission.check(requests)
        if self.drafting is not None:
            self.drafting.prepare(requests)
        with self._work:
            if self.is_closed:
                raise StoppedError("the engine has stopped; nothing is worked on any more.")
            self.admission.add(requests, num_in_work=len(self.batch.requests) + len(self._reading))
            self._work.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request at the next round with `finish_reason="cancelled"`, unless it has ended."""
        with self._work:
            request.is_cancelled = True
            self._work.notify()

    def close(self) -> None:
        """Ends every request at once and takes on no more; only where no round is under way."""
        with self._work:
            self.is_closed = True
            for request in [*self.admission, *self._reading, *self.batch.requests]:
                request.is_cancelled = True
        self._drop()

    @property
    def has_work(self) -> bool:
        """Whether a round would do anything."""
        return bool(self.admission or self._reading or self.batch.requests)

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """Blocks until there is work; False after `timeout` seconds without."""
        with self._work:
            return self._work.wait_for(lambda: self.has_work, timeout)

    def stats(self) -> SchedulerStats:
        """Where it stands."""
        with self._lock:
            return SchedulerStats(
                waiting=len(self.admission),
                reading=len(self._reading),
                running=len(self.batch.requests),
                cache_bytes=self._cached_bytes(),
                rounds=self._rounds,
                prompt_tokens=self._prompt_tokens,
                cached_prompt_tokens=self._cached_tokens,
                new_tokens=self._new_tokens,
                finished=dict(self._finished),
                drafts=DraftCounts() if self.drafting is None else self.drafting.counts.copy(),
            )

    def completion(self, request: Request) -> Completion:
        """What came of a request that has ended."""
        return request.completion(self.runner.sentence_end)

    def round(self) -> list[StreamEvent]:
        """One round; returns its events in order, which `on_event`s have been told of.

        If the model fails, every request in work ends with `finish_reason="error"`, and its `error` says why; those
        that wait go on waiting.
        """
        self._rounds += 1
        events: list[StreamEvent] = []
        try:
            events += self._drop()
            # Before reading, so that a new request's first token doesn't wait for a step.
            if self.batch.requests:
                events += self._settle(self.batch.step())
            events += self._read()
        except Exception as error:
            events += self._fail(error)
        return events

    def next_number(self) -> int:
        """A number that no other request has."""
        with self._lock:
            self._next_number += 1
            return self._next_number - 1

    def _cached_bytes(self) -> int:
        alone = sum(request.cache.num_bytes() for request in self._reading if request.cache is not None)
        return self.batch.num_bytes() + alone

    def _tell(self, events: Sequence[tuple[Request, StreamEvent]]) -> list[StreamEvent]:
        """Counts events and tells those who wait; a request that has ended has left the batch by now."""
        for request, event in events:
            if event.token is not None:
                self._new_tokens += 1
            if event.finish_reason is not None:
                request.is_told = True
                self._finished[event.finish_reason] = self._finished.get(event.finish_reason, 0) + 1
            if request.on_event is not None:
                request.on_event(event)
        return [event for _, event in events]

    def _drop(self) -> list[StreamEvent]:
        """Ends what was cancelled or is late."""
        now = time.monotonic()

        def reason(request: Request) -> FinishReason | None:
            if request.is_cancelled:
                return "cancelled"
            return "deadline" if request.deadline is not None and now >= request.deadline else None

        with self._lock:
            ended = self.admission.remove(reason)
            ended += [request for request in self._reading if reason(request)]
            self._reading = [request for request in self._reading if not reason(request)]
        ended += [request for request in self.batch.requests if reason(request)]
        events = [(request, request.end(reason(request) or "cancelled")) for request in ended]
        self.batch.drop_ended()
        for request in ended:
            request.cache = request.origin = None
        return self._tell(events)

    def _admit(self) -> None:
        """Moves who fits from those that wait to those that are read."""
        with self._lock:
            while (request := self.admission.take([*self.batch.requests, *self._reading])) is not None:
                self._reading.append(request)
                self._prompt_tokens += request.num_prompt_tokens

    def _read(self) -> list[StreamEvent]:
        """Reads prompts: new ones together in one pass; in pieces those that are long, or hold something already."""
        self._admit()
        most = self.limits.max_prefill_tokens
        left = most or 0
        together: list[Request] = []
        apart: list[Request] = []
        for request in self._reading:
            if request.num_read or (most is not None and len(request.ids) > most):
                apart.append(request)
                continue
            left -= len(request.ids)
            if most is None or left >= 0:
                together.append(request)
        events: list[StreamEvent] = []
        if together:
            try:
                logits, cache = self.batch.read(together)
            except Exception:  # those already in the batch are not touched by it; whose fault it is shows alone
                apart = [*together, *apart]
            else:
                events += self._join(together, logits, cache)
        left = 0 if most is None else max(left, most // 4, 1)  # something, however many short ones there are
        for request in apart:
            if most is not None and left <= 0:
                break
            piece = self.runner.piece(request.ids[request.num_read :], None if most is None else left)
            left -= piece
            try:
                logits = self.batch.read_piece(request, piece)
            except Exception as error:
                events += self._fail_requests([request], error)
                continue
            if request.num_read == len(request.ids):
                assert request.cache is not None
                events += self._join([request], logits, request.cache)
        return events

    def _join(self, requests: list[Request], logits: torch.Tensor, cache: RowsCache) -> list[StreamEvent]:
        with self._lock:
            self._reading = [request for request in self._reading if request not in requests]
        self._cached_tokens += sum(request.num_known for request in requests)
        self.batch.join(requests, cache)
        return self._accept(logits, requests)

    def _accept(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[StreamEvent]:
        """Chooses a token for each request."""
        return self._settle(list(zip(requests, self.batch.choose(logits, requests), strict=True)))

    def _settle(self, events: Sequence[tuple[Request, StreamEvent]]) -> list[StreamEvent]:
        """Lets those go that have ended, and tells what came."""
        events = self.batch.with_contexts(events)
        self.batch.drop_ended()
        return self._tell(events)

    def _fail(self, error: Exception) -> list[StreamEvent]:
        """Ends all requests in work: what they hold may be half written."""
        with self._lock:
            reading = list(self._reading)
        return self._fail_requests([*self.batch.clear(), *reading], error)

    def _fail_requests(self, requests: Sequence[Request], error: Exception) -> list[StreamEvent]:
        """Ends these requests; also those whose last token was chosen, but not told."""
        with self._lock:
            self._reading = [request for request in self._reading if request not in requests]
        ended = []
        for request in requests:
            request.error, request.cache, request.origin = error, None, None
            if not request.is_told:
                ended.append((request, request.end("error")))
        return self._tell(ended)

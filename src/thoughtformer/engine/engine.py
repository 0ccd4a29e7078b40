"""Continuing prompts, all at hand: the scheduler's rounds until every one is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from thoughtformer.decode import Drafter, StepCosts, drafters_of
from thoughtformer.engine.admission import Limits
from thoughtformer.engine.request import Completion, Request, StreamEvent, make_request
from thoughtformer.engine.scheduler import Scheduler
from thoughtformer.engine.sessions import Sessions
from thoughtformer.errors import ArgumentError, InputError, nearest
from thoughtformer.runners.opening import runner_of
from thoughtformer.sampling import SamplingParams, derived_seed
from thoughtformer.stores.sentences import SentenceStore

__all__ = ["Engine", "OpenSession", "generate"]


class Engine:
    """Continues prompts with a GPTHF, its plain GPT, or any causal LM, `compress`ed or not.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        max_rows: prompts that share a batch; more wait until one is done.
        pack: on CPUs, give the weights a second copy that is 2 to 3 times as fast to read for few rows.
        compile: compile decoding of a single row; its first step then takes many seconds.
        store: sentences known from before; those that prompts bring anew are added.
        drafts: what proposes tokens, which are verified together: "suffix" copies what followed the same tokens before;
            "model:NAME" has a smaller model write on; "off"; a `Drafter`; or several, of which each step takes what
            promises most. It never changes a text, only how long it takes, and as much is drafted and verified as pays
            by the seconds of this machine's steps.
        session_folder: for sessions that are saved; made by the first call of `session`.

    Raises:
        InputError: `max_rows` below 1; drafts of an unknown name.
        CheckpointError: no such model that drafts.
        UnsupportedError: a store for a model without vectors of sentences; several rows, drafts or compiled steps of a
            model that can't have them; a model that drafts with other ids.

    Packing and compiling belong to the model: of several engines on one model, the one that last read a prompt decides.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_rows: int = 32,
        pack: bool = True,
        compile: bool = False,
        store: SentenceStore | None = None,
        drafts: str | Drafter | Sequence[str | Drafter] = "off",
        session_folder: str | Path = "sessions",
    ) -> None:
        if max_rows < 1:
            raise InputError(f"max_rows={max_rows} must be 1 or more.")
        self.model = model
        self.max_rows = max_rows
        self._costs = StepCosts()
        self.session_folder = Path(session_folder)
        self._sessions: Sessions | None = None
        sentences = None if store is None else store.of(model)
        self.runner = runner_of(model, tokenizer, sentences=sentences, pack=pack, compile=compile)
        self.drafters = [drafter.bound(self.runner) for drafter in drafters_of(drafts)]
        self._scheduler()  # what doesn't go together is told now

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """A completion for each prompt, in their order; arguments and errors as in `stream`."""
        requests = self._requests(prompts, params)
        for _ in self._run(requests):
            pass
        return [request.completion(self.runner.sentence_end) for request in requests]

    def stream(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[StreamEvent]:
        """Every token as it is chosen; closing the iterator stops the work.

        Args:
            prompts: texts, or token ids that start with the end-of-text token.
            params: for all prompts, each of which then has a random stream of its own, or one for each; default:
                greedy.

        Raises:
            InputError: an empty list of ids, or as many params as there are not prompts.
            ContextOverflowError: a prompt and its new tokens exceed the model's trained length.
        """
        yield from self._run(self._requests(prompts, params))

    @contextmanager
    def session(self, name: str) -> Iterator[OpenSession]:
        """A conversation that goes on where it was: in this engine, or on disk, where an engine of this model saved it.

        Leaving the block saves nothing; the engine keeps the session until it goes itself.

        Raises:
            OutputError: the folder of sessions can't be written to.
        """
        if self._sessions is None:
            self._sessions = Sessions(self.runner, folder=self.session_folder)
        yield OpenSession(self, self._sessions, name)

    def _run(self, requests: list[Request]) -> Iterator[StreamEvent]:
        scheduler = self._scheduler()
        scheduler.enqueue(requests)
        while scheduler.has_work:
            yield from scheduler.round()
            failed = next((request.error for request in requests if request.error is not None), None)
            if failed is not None:
                raise failed

    def _scheduler(self) -> Scheduler:
        return Scheduler(self.runner, Limits(max_rows=self.max_rows), drafters=self.drafters, costs=self._costs)

    def _requests(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise InputError("prompts is one string: give a list of prompts.")
        if params is None or isinstance(params, SamplingParams):
            params = _of_each(params or SamplingParams(), len(prompts))
        if len(params) != len(prompts):
            raise InputError(
                f"{len(params)} sampling params for {len(prompts)} prompts: give one for all, or one each."
            )
        return [
            make_request(self.runner, prompt, param, number=number)
            for number, (prompt, param) in enumerate(zip(prompts, params, strict=True))
        ]


class OpenSession:
    """One session of an engine, for turns; `Engine.session` gives it."""

    def __init__(self, engine: Engine, sessions: Sessions, name: str) -> None:
        self.engine = engine
        self.sessions = sessions
        self.name = name

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Completion:
        """What comes after the session's text and `prompt`, which both are part of it from then on.

        Args:
            prompt: text, or ids; what was read before isn't read again.
            params: default: greedy.

        Raises:
            CheckpointError: the session's file is damaged or another model's; or the weights have changed since.
            InputError, ContextOverflowError: as `Engine.stream`, the session's tokens counted.
        """
        session, request = self.sessions.begin(self.name, prompt, params or SamplingParams())
        try:
            for _ in self.engine._run([request]):
                pass
        finally:
            self.sessions.finish(session, request)
            self.sessions.make_room()
        return request.completion(self.engine.runner.sentence_end)

    def save(self) -> None:
        """Writes the session to a file, for another process; see `Sessions.save`."""
        self.sessions.save(self.name)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    *,
    store: SentenceStore | None = None,
    pack: bool = True,
    **settings: Any,
) -> Completion:
    """What a model writes after a prompt: one call, without an engine that stays.

    Args:
        model: as for `Engine`.
        tokenizer: the model's own.
        prompt: text, or token ids.
        store: sentences known from before.
        pack: as for `Engine`; the copy stays in the model.
        settings: those of `SamplingParams`.

    Raises:
        ArgumentError: a setting that there isn't.
        InputError, ContextOverflowError, UnsupportedError: as `Engine`.
    """
    known = [field.name for field in fields(SamplingParams)]
    for name in settings:
        if name not in known:
            raise ArgumentError(f"generate takes no argument {name!r}.{nearest(name, known)}")
    engine = Engine(model, tokenizer, max_rows=1, store=store, pack=pack)
    return engine.generate([prompt], SamplingParams(**settings))[0]


def _of_each(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The params of each of `count` requests; no two share their draws."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=derived_seed(params.seed, index)) for index in range(count)]

"""Bodies of HTTP to requests of the engine, and back: the part of the server between HTTP and the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from thoughtformer.engine import Completion, Scheduler, Sessions, StreamEvent
from thoughtformer.engine.request import Request
from thoughtformer.engine.sessions import Session
from thoughtformer.engine.worker import Worker
from thoughtformer.errors import ContextOverflowError, InputError, TooLargeError
from thoughtformer.runners.base import Runner
from thoughtformer.sampling import SamplingParams, derived_seed
from thoughtformer.serve.schemas import ChatRequest, CompletionRequest, GenerationRequest
from thoughtformer.text.chat import encode_chat

__all__ = ["Generation", "ServeSettings", "Service"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


#: Of a prompt where neither model nor settings name a limit: what can be read while others wait.
MOST_TOKENS = 1 << 17


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What the server takes on, beside the scheduler's limits.

    Attributes:
        model_name: as clients name it.
        token: that clients must bear; None: none.
        max_body_bytes: of a request; more is refused with 413.
        max_prompt_tokens: of a prompt, a session's context included; longer ones get 413. None: the model's own limit,
            or `MOST_TOKENS` where it has none.
        max_choices: completions that one request may ask for, over all prompts.
        max_new_tokens: that one completion may ask for.
        default_new_tokens: of a chat that doesn't say, as far as there is room; None: as many as there is room for, and
            this server writes.
        request_seconds: a request that takes longer ends with 504.
        allowed_hosts: names by which the server may be called; none: any. Without a token, a page of another origin
            could otherwise reach it by a name that it made to mean this machine.
        cors_origins: of pages whose scripts may call the server (`https://host:port`, or `*` for any); none: no page's
            but its own.
    """

    model_name: str
    token: str | None = None
    max_body_bytes: int = 8 << 20
    max_prompt_tokens: int | None = None
    max_choices: int = 64
    max_new_tokens: int = 4096
    default_new_tokens: int | None = None
    request_seconds: float = 600.0
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()


class Service:
    """One model, served.

    Args:
        scheduler: runs its rounds here, in a thread of its own.
        sessions: named contexts.
        settings: limits.
    """

    def __init__(self, scheduler: Scheduler, sessions: Sessions, settings: ServeSettings) -> None:
        self.scheduler = scheduler
        self.sessions = sessions
        self.settings = settings
        self.worker = Worker(scheduler)
        self.created = int(time.time())
        # One thread: the tokenizer's settings are no two threads' business.
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="thoughtformer-prepare")
        # Another: no request waits for a slow disk.
        self._saving = ThreadPoolExecutor(max_workers=1, thread_name_prefix="thoughtformer-save")

    @property
    def store_failures(self) -> int:
        """How often the sentence store couldn't be used."""
        sentences = self.scheduler.runner.sentences
        return 0 if sentences is None else sentences.failures

    @property
    def runner(self) -> Runner:
        """The model."""
        return self.scheduler.runner

    @property
    def most_prompt_tokens(self) -> int | None:
        """That this server reads; None: what the model was trained for."""
        most = self.settings.max_prompt_tokens
        return MOST_TOKENS if most is None and self.runner.max_tokens is None else most

    def start(self) -> None:
        """Begins to work."""
        self.worker.start()

    def stop(self) -> None:
        """Ends all requests, and saves sessions."""
        self.worker.stop()
        self._preparing.shutdown(wait=True)
        self._saving.shutdown(wait=True)
        self.sessions.close()

    async def prepared(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, done beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    async def save_idle(self) -> None:
        """Lets go of idle sessions now and then, for ever."""
        while True:
            await asyncio.sleep(1.0)
            try:
                await self.saving(self.sessions.save_idle)
            except Exception:
                logger.exception("idle sessions couldn't be looked through")

    async def saving(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, done where sessions are written: it may have to wait for a disk."""
        return await asyncio.get_running_loop().run_in_executor(self._saving, work)

    async def finish(self, session: Session, request: Request) -> None:
        """Gives a session what came of its request; memory is made room in beside that."""

        def finish() -> None:
            self.sessions.finish(session, request)
            if self.sessions.num_bytes() > self.sessions.max_bytes:
                with contextlib.suppress(RuntimeError):  # stopped meanwhile: all sessions are saved then
                    self._saving.submit(self.sessions.make_room)

        await self.prepared(finish)

    async def begin(self, body: GenerationRequest, *, client: str = "") -> Generation:
        """Takes on a request; iterate over it, and close it whatever happens. Clients take turns.

        Raises:
            ThoughtformerError: what can't be taken on; nothing of it is then.
        """
        generation = Generation(self, asyncio.get_running_loop())
        try:
            await self.prepared(lambda: self._submit(body, generation, client))
        except BaseException:
            await generation.close()
            raise
        return generation

    def _submit(self, body: GenerationRequest, generation: Generation, client: str) -> None:
        settings = self.settings
        if isinstance(body, CompletionRequest):
            asked, default = body.max_tokens, 16  # OpenAI's default
            prompts: list[str | list[int]] = body.prompts
        else:
            assert isinstance(body, ChatRequest)
            asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
            default = settings.default_new_tokens or settings.max_new_tokens
            prompts = [self._chat(body)]
        new_tokens = min(default, settings.max_new_tokens) if asked is None else asked
        count = len(prompts) * body.number_of_choices
        if not prompts:
            raise InputError("prompt is an empty list: give one prompt or more.")
        if count > settings.max_choices:
            raise InputError(
                f"{len(prompts)} prompts with n={body.number_of_choices} are {count} completions, but one request "
                f"may ask for {settings.max_choices}."
            )
        if new_tokens > settings.max_new_tokens:
            raise InputError(f"max_tokens={new_tokens}, but this server writes {settings.max_new_tokens} at most.")
        if body.session is not None and len(prompts) > 1:
            raise InputError("a session takes one prompt at a time.")
        # What nobody asked for is no demand: it gives way to the room that there is.
        params = _params(body, new_tokens, fits_room=asked is None)
        for index in range(count):
            place = divmod(index, body.number_of_choices)
            own = params if params.seed is None else replace(params, seed=derived_seed(params.seed, *place))
            self._prepare(prompts[place[0]], own, body, generation)
        for request in generation.requests:
            request.client = client
        self.scheduler.enqueue(generation.requests)

    def _prepare(
        self, prompt: str | list[int], params: SamplingParams, body: GenerationRequest, generation: Generation
    ) -> None:
        session = None
        if isinstance(prompt, str):
            self._refuse_much_too_long(prompt)
        if body.session is None:
            request = self.scheduler.prepare(prompt, params)
        else:
            session, request = self.sessions.begin(
                body.session,
                prompt,
                params,
                number=self.scheduler.next_number(),
                closes_sentence=isinstance(body, ChatRequest),
            )
        generation.add(request, session)
        most = self.most_prompt_tokens
        if most is not None and request.num_prompt_tokens > most:
            raise TooLargeError(
                f"the prompt has {request.num_prompt_tokens} tokens, a session's context included; this server reads "
                f"{most} at most."
            )
        request.follower = self.runner.new_follower() if body.return_context else None
        request.deadline = time.monotonic() + self.settings.request_seconds

    def _refuse_much_too_long(self, text: str) -> None:
        """Refuses a text without reading all of it, so that nobody waits while millions of characters are read."""
        most, trained = self.most_prompt_tokens, self.runner.max_tokens
        limit = min(count for count in (most, trained) if count is not None)
        if not self.runner.has_more_tokens(text, limit):
            return
        kind = TooLargeError if limit == most else ContextOverflowError
        raise kind(
            f"the prompt has {len(text):,} characters, more than {limit:,} tokens, which is what "
            f"{'this server reads' if limit == most else 'the model was trained for'} at most. Shorten it."
        )

    def parts_of(self, request: Request) -> dict[str, Any]:
        """A prompt as it is held: what is kept of its start, its folded sentences or spans, and the rest, as text."""
        kept, closed, rest = self.runner.parts(request.ids[: request.num_prompt_tokens])
        return {"kept": kept, "sentences": closed, "open": rest}

    def _chat(self, body: ChatRequest) -> list[int]:
        messages = [message.for_template() for message in body.messages]
        # All at once: many short messages are as much to read as a long one.
        contents = (message.get("content") for message in messages)
        self._refuse_much_too_long("".join(content for content in contents if isinstance(content, str)))
        template = str(getattr(self.runner.tokenizer, "tokenizer", self.runner.tokenizer).chat_template)
        for message in messages:
            # OpenAI's newer name for the same. Templates that don't know it would leave the message out, or write a
            # role that the model has never seen.
            if message["role"] == "developer" and "developer" not in template:
                message["role"] = "system"
        is_new = body.session is None or not self.sessions.has(body.session)
        return encode_chat(self.runner.tokenizer, messages, start=is_new)


class Generation:
    """The requests of one body, as events in the order in which they come.

    Closing it before the end cancels what is left; that is what a client who goes away amounts to.
    """

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self.service = service
        self.requests: list[Request] = []
        self.session: Session | None = None
        self._loop = loop
        self._events: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue()
        self._unfinished = 0

    def add(self, request: Request, session: Session | None = None) -> None:
        """Follows a request, before it is enqueued, and its session."""
        index, self.session = len(self.requests), session
        self.requests.append(request)
        self._unfinished += 1

        def tell(event: StreamEvent) -> None:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
            except RuntimeError:  # the loop has closed: nobody waits any more
                self.service.scheduler.cancel(request)

        request.on_event = tell

    async def events(self) -> AsyncIterator[tuple[int, StreamEvent]]:
        """Each request's index and event, until all have ended."""
        while self._unfinished:
            index, event = await self._events.get()
            if event.finish_reason is not None:
                self._unfinished -= 1
                if not self._unfinished:
                    await self._end_session()
            yield index, event

    def completions(self) -> Sequence[Completion]:
        """What came of the requests, once all have ended."""
        return [self.service.scheduler.completion(request) for request in self.requests]

    async def close(self) -> None:
        """Cancels what hasn't ended."""
        for request in self.requests:
            if request.finish_reason is None:
                self.service.scheduler.cancel(request)
        await self._end_session()

    async def _end_session(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            await asyncio.shield(self.service.finish(session, self.requests[0]))


def _params(body: GenerationRequest, new_tokens: int, *, fits_room: bool) -> SamplingParams:
    chosen = {
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "stop_token_ids": body.stop_token_ids,
    }
    return SamplingParams(
        max_new_tokens=new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,  # OpenAI's default
        seed=body.seed,
        stop=body.stop_strings,
        ignore_end_of_text=body.ignore_eos,
        fits_room=fits_room,
        prediction="" if body.prediction is None else body.prediction.text,
        **{name: value for name, value in chosen.items() if value is not None},  # type: ignore[arg-type]
    )

"""Named contexts that stay compressed between requests: in memory while in use, on disk when idle.

A session is the tokens read so far and what the model holds of them. Requests continue from it without reading it
again. Its file is refused if another model wrote it (`stores/session_files.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thoughtformer.cache.rows import RowsCache
from thoughtformer.engine.request import Request, make_request
from thoughtformer.errors import BusyError, CheckpointError, InputError, OutputError, UnsupportedError
from thoughtformer.runners.base import Runner
from thoughtformer.sampling import SamplingParams
from thoughtformer.stores.session_files import SessionFiles, key_of

__all__ = ["Session", "Sessions"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Session:
    """One context.

    Attributes:
        key: digest of its name.
        ids: tokens of its prompts and completions.
        num_read: of these, how many `cache` has.
        cache: of one row; None before the first request.
        is_busy: a request is under way.
        used: when a request last ended, on the monotonic clock.
        is_saved: the file has it as it is.
        weights: the state of those that computed what `cache` holds.
    """

    key: str
    ids: list[int] = field(default_factory=list)
    num_read: int = 0
    cache: RowsCache | None = None
    is_busy: bool = False
    used: float = field(default_factory=time.monotonic)
    is_saved: bool = False
    weights: bytes | None = None

    def num_bytes(self) -> int:
        """Held in memory."""
        return 0 if self.cache is None else self.cache.num_bytes()


class Sessions:
    """The sessions of one model. Methods may be called from any thread.

    Args:
        runner: the model whose contexts they are.
        folder: for those not in memory; None: they are lost when memory is short.
        max_bytes: held in memory by idle sessions; the least recently used are saved and let go.
        idle_seconds: a session unused for so long is saved and let go.

    Raises:
        OutputError: the folder can't be written to.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        folder: Path | None = None,
        max_bytes: int = 1 << 30,
        idle_seconds: float = 300.0,
    ) -> None:
        self.runner = runner
        self.files = None if folder is None else SessionFiles(folder)
        self.max_bytes = max_bytes
        self.idle_seconds = idle_seconds
        self._lock = threading.Lock()
        # Files are written and removed one at a time, while requests go on; always taken before the other lock.
        self._writing = threading.Lock()
        self._cached: OrderedDict[str, Session] = OrderedDict()
        self.failures = 0

    def has(self, name: str) -> bool:
        """Whether there is something to go on from, in memory or on disk."""
        return self._has(key_of(name))

    def _has(self, key: str) -> bool:
        return key in self._cached or (self.files is not None and self.files.has(key))

    def begin(
        self,
        name: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        number: int = 0,
        closes_sentence: bool = False,
    ) -> tuple[Session, Request]:
        """A request that goes on from the named session with `prompt`, text or ids; end it with `finish`.

        With `closes_sentence` the session's open sentence ends before the prompt, as a turn of a conversation does.

        Raises:
            BusyError: another request on the session is under way.
            CheckpointError: its file is damaged, or another model's; or the model's weights have changed since.
            InputError, ContextOverflowError: as `make_request`, counting the session's tokens.
        """
        key = key_of(name)
        weights = self.runner.weights_state()  # all of them are read: not while others wait for the lock
        with self._lock:
            session = self._cached.get(key) or self._load(key, weights)
            if session.is_busy:
                raise BusyError(f"a request on session {name!r} is under way: wait for it, or use another session.")
            if session.cache is not None and session.weights != weights:
                raise CheckpointError(
                    f"the model's weights have changed since session {name!r} was read: delete the session, or put "
                    "them back."
                )
            new = self.runner.encode(prompt, start=not session.ids) if isinstance(prompt, str) else list(prompt)
            end = self.runner.sentence_end
            if closes_sentence and session.ids and end is not None:
                new = new if session.ids[-1] in (end, *self.runner.end_ids) else [end, *new]
            request = make_request(self.runner, [*session.ids, *new], params, number=number)
            if session.cache is not None and request.num_prompt_tokens > session.num_read:
                request.go_on_from(session.cache, session.num_read)
            request.keeps_cache = True
            session.is_busy, session.weights = True, weights
            self._cached[key] = session
            self._cached.move_to_end(key)
        return session, request

    def finish(self, session: Session, request: Request) -> None:
        """Takes over what a request came to, if it has ended by itself; else the session stays as it was before.

        Call `make_room` some time after. A request still in work may be finished with as well: it goes on with a copy.
        """
        with self._lock:
            session.is_busy = False
            session.used = time.monotonic()
            if request.has_ended_itself and request.cache is not None:
                ids = request.shown_ids  # what follows an end would be another document, which doesn't see this one
                session.ids, session.cache, session.num_read = ids, request.cache, min(request.num_read, len(ids))
                session.is_saved = False
            if session.cache is None:
                self._cached.pop(session.key, None)

    def delete(self, name: str) -> bool:
        """Forgets a session, in memory and on disk; whether there was one.

        Raises:
            BusyError: a request on it is under way.
        """
        key = key_of(name)
        with self._writing, self._lock:
            session = self._cached.get(key)
            if session is not None and session.is_busy:
                raise BusyError(f"a request on session {name!r} is under way: wait for it.")
            existed = self._has(key)
            self._cached.pop(key, None)
            if self.files is not None:
                self.files.remove(key)
        return existed

    def save(self, name: str) -> None:
        """Writes a session to its file now, as it was before a request under way; it stays in memory.

        Raises:
            InputError: there is no such session, or no folder for files.
            CheckpointError: the model's weights have changed since it was read.
            UnsupportedError: no file can say how it goes on: a policy is a callback.
            OutputError: it can't be written.
        """
        key = key_of(name)
        if self.files is None:
            raise InputError("sessions of this engine have no folder: name one when it is made.")
        with self._writing:
            with self._lock:
                session = self._cached.get(key)
                if session is None or session.cache is None:
                    if self.files.has(key):
                        return
                    raise InputError(f"there is no session {name!r}: nothing was generated in it.")
                ids, num_read, cache, weights = session.ids, session.num_read, session.cache, session.weights
            if weights != self.runner.weights_state():
                raise CheckpointError(f"the model's weights have changed since session {name!r} was read.")
            self._save(key, ids, num_read, cache)
            with self._lock:
                session.is_saved = session.cache is cache

    def num_bytes(self) -> int:
        """Held in memory."""
        with self._lock:
            return sum(session.num_bytes() for session in self._cached.values())

    def num_cached(self) -> int:
        """Sessions in memory."""
        return len(self._cached)

    def save_idle(self) -> None:
        """Saves and lets go of those unused for long; to be called now and then."""
        if self.files is None:
            return
        with self._lock:
            until = time.monotonic() - self.idle_seconds
            idle = [session for session in self._cached.values() if session.used <= until]
        for session in idle:
            self._let_go(session)

    def make_room(self) -> None:
        """Saves and lets go of the least recently used, as long as more is held than may be."""
        with self._lock:
            sessions = list(self._cached.values())
        for session in sessions:
            if self.num_bytes() <= self.max_bytes:
                return
            self._let_go(session)

    def close(self) -> None:
        """Saves all that aren't saved; busy ones as they were before the request under way."""
        if self.files is not None:
            for session in list(self._cached.values()):
                self._let_go(session, even_busy=True)

    def _let_go(self, session: Session, *, even_busy: bool = False) -> None:
        """Out of memory, if it is safe on disk; what can't be saved stays, and the log says so."""
        with self._writing:
            with self._lock:
                if self._cached.get(session.key) is not session or (session.is_busy and not even_busy):
                    return
                ids, num_read, cache, is_saved = session.ids, session.num_read, session.cache, session.is_saved
            if not is_saved and cache is not None:
                try:
                    if session.weights != self.runner.weights_state():
                        raise OutputError("the model's weights have changed since it was read.")
                    self._save(session.key, ids, num_read, cache)
                except Exception as error:  # a full disk, or no memory for the copy: others are still to be saved
                    self.failures += 1
                    logger.error("a session stays in memory: %s", error, exc_info=not isinstance(error, OutputError))
                    return
            with self._lock:
                # Unless a request has begun meanwhile, or come to its end.
                if session.cache is cache and (even_busy or not session.is_busy):
                    session.is_saved = True
                    del self._cached[session.key]

    def _save(self, key: str, ids: Sequence[int], num_read: int, cache: RowsCache) -> None:
        if self.files is not None and not self.runner.can_save:
            raise UnsupportedError(
                f"a session of {self.runner.model.method!r} can't be saved: no file can say how it goes on."
            )
        if self.files is not None:
            self.files.write(key, self.runner.identity(), ids, num_read, cache)

    def _load(self, key: str, weights: bytes | None) -> Session:
        """The session of that key: from its file, or a new one."""
        session = Session(key=key)
        if self.files is None or not self.files.has(key):
            return session
        cache, runner = self.runner.new_cache(1), self.runner
        session.ids, session.num_read = self.files.read(
            key, runner.identity(), cache, vocab_size=runner.vocab_size, check_history=runner.check_history
        )
        session.cache, session.is_saved, session.weights = cache, True, weights
        return session

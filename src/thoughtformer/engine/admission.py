"""Who is taken on, who waits, and who comes next: in turns among clients, first come first served within one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from thoughtformer.engine.request import Request
from thoughtformer.errors import ConfigError, OverloadedError, TooLargeError
from thoughtformer.runners.base import Runner

__all__ = ["Admission", "Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a scheduler takes on.

    Attributes:
        max_rows: requests written at once.
        max_bytes: that the requests may come to hold together, between steps; None: no limit.
        max_waiting: requests that wait; more are refused. None: no limit.
        max_prefill_tokens: prompt tokens read between two steps of the running requests; longer prompts are read in
            pieces. None: all at once.

    Raises:
        ConfigError: a limit below 1.
    """

    max_rows: int = 32
    max_bytes: int | None = None
    max_waiting: int | None = None
    max_prefill_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_bytes", "max_waiting", "max_prefill_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more.")


class Admission:
    """The queues of those that wait. All but `check` and `most_bytes` need the scheduler's lock.

    Whoever's turn it is and doesn't fit yet is waited for, so that large requests get in too.

    Args:
        runner: the model, which knows what a request may come to hold.
        limits: what is taken on.
    """

    def __init__(self, runner: Runner, limits: Limits) -> None:
        self.runner = runner
        self.limits = limits
        self._queues: OrderedDict[str, deque[Request]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __bool__(self) -> bool:
        return bool(self._queues)  # also without the lock

    def __iter__(self) -> Iterator[Request]:
        return (request for queue in self._queues.values() for request in queue)

    def most_bytes(self, requests: Sequence[Request]) -> int:
        """What these requests may come to hold together, between steps."""
        if not requests:
            return 0
        return self.runner.most_bytes(
            [request.most_entries for request in requests], max(request.most_tokens for request in requests)
        )

    def check(self, requests: Sequence[Request]) -> None:
        """Whether requests could ever be worked on, together; shortens what they write, where they let it.

        Raises:
            TooLargeError: one would never fit `max_bytes`, or all never be in work at once.
        """
        limits = self.limits
        for request in requests:
            if request.params.fits_room and limits.max_bytes is not None:
                self._shorten(request, limits.max_bytes)
            if limits.max_bytes is not None and (needed := self.most_bytes([request])) > limits.max_bytes:
                raise TooLargeError(
                    f"a prompt of {request.num_prompt_tokens} tokens and {request.params.max_new_tokens} new ones may "
                    f"hold {needed} bytes, but all requests together may hold {limits.max_bytes}. Shorten the prompt "
                    "or ask for fewer new tokens."
                )
        most = None if limits.max_waiting is None else limits.max_waiting + limits.max_rows
        if most is not None and len(requests) > most:
            raise TooLargeError(f"{len(requests)} completions at once, but {most} may be in work: ask for fewer.")

    def add(self, requests: Sequence[Request], *, num_in_work: int) -> None:
        """Queues all of them, or none.

        Raises:
            OverloadedError: `max_waiting` requests wait already.
        """
        limits, waiting = self.limits, len(self)
        free = max(0, limits.max_rows - num_in_work)
        if limits.max_waiting is not None and waiting + len(requests) > limits.max_waiting + free:
            raise OverloadedError(
                f"{waiting} requests wait already, and no more than {limits.max_waiting} may: try again later."
            )
        for request in requests:
            self._queues.setdefault(request.client, deque()).append(request)

    def take(self, in_work: Sequence[Request]) -> Request | None:
        """Whose turn it is, if it fits beside those in work; its client goes to the end of the line."""
        limits = self.limits
        if not self._queues or len(in_work) >= limits.max_rows:
            return None
        client, queue = next(iter(self._queues.items()))
        if limits.max_bytes is not None and self.most_bytes([*in_work, queue[0]]) > limits.max_bytes:
            return None
        request = queue.popleft()
        del self._queues[client]
        if queue:
            self._queues[client] = queue
        return request

    def remove(self, has_ended: Callable[[Request], object]) -> list[Request]:
        """Takes those out that have ended, and returns them."""
        ended = [request for request in self if has_ended(request)]
        for client, queue in list(self._queues.items()) if ended else ():
            left = deque(request for request in queue if request not in ended)
            if left:
                self._queues[client] = left
            else:
                del self._queues[client]
        return ended

    def _shorten(self, request: Request, max_bytes: int) -> None:
        """Has a request write as many tokens as its params say, or as there is memory for; at least one."""
        if self.most_bytes([request]) <= max_bytes:
            return
        fitting, most = 1, request.params.max_new_tokens
        while fitting < most:
            middle = (fitting + most + 1) // 2
            request.limit_new_tokens(self.runner, middle)
            if self.most_bytes([request]) <= max_bytes:
                fitting = middle
            else:
                most = middle - 1
        request.limit_new_tokens(self.runner, fitting)

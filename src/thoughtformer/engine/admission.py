"""Who is taken on, who waits, and who comes next: in turns among clients, first come first served within one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from thoughtformer.engine.rows import Row
from thoughtformer.errors import ConfigError, OverloadedError, TooLargeError
from thoughtformer.runners.base import Reader

__all__ = ["Admission", "Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a scheduler takes on.

    Attributes:
        max_rows: requests written at once.
        max_bytes: that the rows may come to hold together, between steps; None: no limit.
        max_waiting: requests that wait; more are refused. None: no limit.
        max_prefill_tokens: prompt tokens read between two steps of the running rows; longer prompts are read in
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
        reader: the model, which knows what a row may come to hold.
        limits: what is taken on.
    """

    def __init__(self, reader: Reader, limits: Limits) -> None:
        self.reader = reader
        self.limits = limits
        self._queues: OrderedDict[str, deque[Row]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __bool__(self) -> bool:
        return bool(self._queues)  # also without the lock

    def __iter__(self) -> Iterator[Row]:
        return (row for queue in self._queues.values() for row in queue)

    def most_bytes(self, rows: Sequence[Row]) -> int:
        """What these rows may come to hold together, between steps."""
        if not rows:
            return 0
        return self.reader.most_bytes([row.most_entries for row in rows], max(row.most_tokens for row in rows))

    def check(self, rows: Sequence[Row]) -> None:
        """Whether a request could ever be worked on; shortens what its rows write, where they let it.

        Raises:
            TooLargeError: it would never fit `max_bytes`, or be in work at once.
        """
        limits = self.limits
        for row in rows:
            if row.params.fits_room and limits.max_bytes is not None:
                self._shorten(row, limits.max_bytes)
            if limits.max_bytes is not None and (needed := self.most_bytes([row])) > limits.max_bytes:
                raise TooLargeError(
                    f"a prompt of {row.num_prompt_tokens} tokens and {row.params.max_new_tokens} new ones may hold "
                    f"{needed} bytes, but all requests together may hold {limits.max_bytes}. Shorten the prompt or "
                    "ask for fewer new tokens."
                )
        most = None if limits.max_waiting is None else limits.max_waiting + limits.max_rows
        if most is not None and len(rows) > most:
            raise TooLargeError(f"{len(rows)} completions at once, but {most} may be in work: ask for fewer.")

    def add(self, rows: Sequence[Row], *, num_in_work: int) -> None:
        """Queues all rows of a request, or none.

        Raises:
            OverloadedError: `max_waiting` requests wait already.
        """
        limits, waiting = self.limits, len(self)
        free = max(0, limits.max_rows - num_in_work)
        if limits.max_waiting is not None and waiting + len(rows) > limits.max_waiting + free:
            raise OverloadedError(
                f"{waiting} requests wait already, and no more than {limits.max_waiting} may: try again later."
            )
        for row in rows:
            self._queues.setdefault(row.client, deque()).append(row)

    def take(self, in_work: Sequence[Row]) -> Row | None:
        """Whose turn it is, if it fits beside those in work; its client goes to the end of the line."""
        limits = self.limits
        if not self._queues or len(in_work) >= limits.max_rows:
            return None
        client, queue = next(iter(self._queues.items()))
        if limits.max_bytes is not None and self.most_bytes([*in_work, queue[0]]) > limits.max_bytes:
            return None
        row = queue.popleft()
        del self._queues[client]
        if queue:
            self._queues[client] = queue
        return row

    def remove(self, has_ended: Callable[[Row], object]) -> list[Row]:
        """Takes those out that have ended, and returns them."""
        ended = [row for row in self if has_ended(row)]
        for client, queue in list(self._queues.items()) if ended else ():
            left = deque(row for row in queue if row not in ended)
            if left:
                self._queues[client] = left
            else:
                del self._queues[client]
        return ended

    def _shorten(self, row: Row, max_bytes: int) -> None:
        """Has a row write as many tokens as its params say, or as there is memory for; at least one."""
        if self.most_bytes([row]) <= max_bytes:
            return
        fitting, most = 1, row.params.max_new_tokens
        while fitting < most:
            middle = (fitting + most + 1) // 2
            row.limit_new_tokens(self.reader, middle)
            if self.most_bytes([row]) <= max_bytes:
                fitting = middle
            else:
                most = middle - 1
        row.limit_new_tokens(self.reader, fitting)

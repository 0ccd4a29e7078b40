"""How much of what is drafted pays: seconds of a step by its tokens, measured, against tokens that it may yield."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

__all__ = ["StepCosts", "allotted"]

#: Tokens of a pass that are timed, those of the other rows beside, until a pass takes twice as long as without drafts.
WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
#: Times each; the shortest counts.
TIMES = 3
#: Drafts that promise less than this against a step without any are left: what passes take isn't known so well.
GAIN = 1.08
#: By which one more step moves what is known of its width.
WEIGHT = 0.1


class StepCosts:
    """Seconds of a pass by how many tokens it reads, of all rows together; known for each number of rows apart."""

    def __init__(self) -> None:
        self._of_rows: dict[int, RowCosts] = {}

    def of(self, num_rows: int) -> RowCosts:
        """Of passes of so many rows; numbers of rows count alike up to the next power of two."""
        return self._of_rows.setdefault(1 << (num_rows - 1).bit_length(), RowCosts())


class RowCosts:
    """Seconds of a pass of some rows by how many tokens it reads."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}
        #: Timing them was tried.
        self.is_tried = False

    @property
    def is_measured(self) -> bool:
        """Whether anything is known."""
        return bool(self._known)

    def measure(self, seconds_of: Callable[[int], float], num_rows: int = 1) -> None:
        """Times passes of several widths, from a token a row on; `seconds_of` takes one of so many tokens."""
        self.is_tried = True
        widths = [num_rows - 1 + width for width in WIDTHS]
        for _ in range(TIMES):  # in turns, so that a slow moment makes no width look dear
            for place, width in enumerate(widths):
                self._known[width] = min(seconds_of(width), self._known.get(width, math.inf))
                if self._known[width] > 2 * self._known[num_rows]:
                    widths = widths[: place + 1]
                    break

    def add(self, num_tokens: int, seconds: float) -> None:
        """One more pass was timed. One that took ten times as long as known is somebody else's doing."""
        known = self.seconds(num_tokens) if self._known else math.inf
        if known < math.inf and seconds < 10 * known:
            self._known[num_tokens] = known + WEIGHT * (seconds - known)

    def seconds(self, num_tokens: int) -> float:
        """Of a pass; between widths as along a line, never less than a narrower one's, beyond all widths infinite."""
        points: list[tuple[int, float]] = []
        for width, seconds in sorted(self._known.items()):
            points.append((width, max([seconds, *(known for _, known in points[-1:])])))
        for (left, low), (right, high) in pairwise(points):
            if num_tokens <= right:
                return low + (high - low) * (num_tokens - left) / (right - left)
        return points[0][1] if num_tokens <= points[0][0] else math.inf


def _by_survival(survivals: Sequence[Sequence[float]]) -> Iterator[tuple[int, float]]:
    """All drafted tokens, the likeliest first, each behind those before it; of equal ones the first row's."""
    waiting = [(-survival[0], row, 0) for row, survival in enumerate(survivals) if survival]
    heapq.heapify(waiting)
    while waiting:
        least, row, place = heapq.heappop(waiting)
        yield row, -least
        if place + 1 < len(survivals[row]):
            # A later token survives no more often than those before it, whatever a drafter says.
            heapq.heappush(waiting, (max(-survivals[row][place + 1], least), row, place + 1))


def allotted(
    survivals: Sequence[Sequence[float]], seconds: Callable[[int], float], drafting: Sequence[float] = ()
) -> list[int]:
    """How many tokens of each row's draft to verify, so that the step yields the most tokens a second; none for less
    than `GAIN`.

    A step yields a token a row, and of a draft each token with its survival. Of any number of drafted tokens the
    likeliest yield most, so all numbers are compared; where drafting itself costs time, it is the best of these, not
    surely of all.

    Args:
        survivals: of each row's draft.
        seconds: of a pass of so many tokens.
        drafting: seconds that each token of a row's draft takes to be drafted; none given: it is drafted already.
    """
    taken, best = [0] * len(survivals), [0] * len(survivals)
    num_tokens, tokens = len(survivals), float(len(survivals))
    # Beyond what is known it is 0: then nothing is better.
    most = GAIN * tokens / seconds(num_tokens)
    drafted = 0.0
    for row, survival in _by_survival(survivals):
        taken[row] += 1
        num_tokens += 1
        tokens += survival
        drafted += drafting[row] if drafting else 0.0
        if tokens / (seconds(num_tokens) + drafted) > most:
            most, best = tokens / (seconds(num_tokens) + drafted), list(taken)
    return best

"""Drafts: tokens that something cheap proposes, and the model verifies in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

__all__ = ["Drafter"]


class Drafter(ABC):
    """Proposes what may come next.

    It decides nothing: tokens are chosen by the request's own sampler, one after the other, as without drafts, until
    one differs from the draft. So a draft can save steps or cost time, and never changes a text.
    """

    @abstractmethod
    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Tokens that may come after `ids`, at most so many; none for an ordinary step.

        What can't be verified is cut off: ids that the model hasn't, and ends of a text with all behind them.
        """

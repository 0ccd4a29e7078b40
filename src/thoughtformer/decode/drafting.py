"""Drafts: tokens that something cheap proposes, and the model verifies in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from thoughtformer.errors import InputError, nearest

__all__ = ["DRAFTERS", "Draft", "Drafter", "drafter_named"]

#: Strategies by name; made without settings, each must do.
DRAFTERS: dict[str, type[Drafter]] = {}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        ids: one behind the other.
        survival: of each, how likely it and all before it are to be chosen; from 0 to 1, falling.
    """

    ids: Sequence[int]
    survival: Sequence[float]


class Drafter(ABC):
    """Proposes what may come next.

    It decides nothing: tokens are chosen by the request's own sampler, one after the other, as without drafts, until
    one differs from the draft. So a draft can save steps or cost time, and never changes a text.

    What a strategy knows of a request lies in what `begin` makes for it. All methods are called in the thread that runs
    the engine's rounds.
    """

    #: By which `drafts="NAME"` asks for it; "": by no name.
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            DRAFTERS[cls.name] = cls

    def begin(self, *, client: str = "", prediction: Sequence[int] = ()) -> Drafter:
        """What drafts for one request of a client's; here the same for all. The answer may well repeat `prediction`.

        What one client wrote must not show in how fast another is answered.
        """
        return self

    @abstractmethod
    def propose(self, ids: Sequence[int], most: int) -> Draft | Sequence[int]:
        """Tokens that may come after `ids`, at most so many; none for an ordinary step.

        What can't be verified is cut off: ids that the model hasn't, and ends of a text with all behind them. Plain ids
        count as certain.
        """

    def observe(self, num_verified: int, num_right: int) -> None:
        """Of what was proposed last, so many tokens were verified, and the first so many were chosen."""
        return

    def finish(self, ids: Sequence[int]) -> None:
        """The request has come to its end with these ids."""
        return


def drafter_named(name: str) -> Drafter | None:
    """The strategy of a name; None for "off".

    Raises:
        InputError: there is none of that name.
    """
    if name == "off":
        return None
    if name not in DRAFTERS:
        raise InputError(f"drafts={name!r} is unknown.{nearest(name, ['off', *DRAFTERS])}")
    return DRAFTERS[name]()

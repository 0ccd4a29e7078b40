"""Drafts: tokens that something cheap proposes, and the model verifies in one pass."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from thoughtformer.errors import InputError, nearest
from thoughtformer.runners import Runner

__all__ = ["DRAFTERS", "Draft", "Drafter", "Forecast", "Guess", "drafters_of", "verifiable"]

#: Strategies by name.
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


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a draft may be worth that isn't made yet.

    Attributes:
        survival: as of a draft.
        seconds: that each of its tokens takes to make.
    """

    survival: Sequence[float]
    seconds: float


@runtime_checkable
class Guess(Protocol):
    """How a request chooses, for those who draft by a model of their own: see `Sampler.guess`."""

    def __call__(self, ids: Sequence[int], logits: Float[Tensor, " vocab"], ahead: int) -> tuple[int, float]:
        """What it would choose behind `ids`, `ahead` tokens from now, by these logits, and how likely that is."""
        ...


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

    @classmethod
    def from_argument(cls, argument: str) -> Drafter:
        """What `drafts="NAME:ARGUMENT"` asks for; "" where nothing follows the name. Raises `InputError`."""
        if argument:
            raise InputError(f"drafts='{cls.name}:{argument}': {cls.name!r} takes nothing behind a colon.")
        return cls()

    def bound(self, runner: Runner) -> Drafter:
        """What drafts for a model: itself, or one that shares what it learns. Raises `UnsupportedError`."""
        return self

    def begin(self, *, client: str = "", prediction: Sequence[int] = (), guess: Guess | None = None) -> Drafter:
        """What drafts for one request of a client's; here the same for all. The answer may well repeat `prediction`.

        What one client wrote must not show in how fast another is answered.
        """
        return self

    def forecast(self, ids: Sequence[int], most: int) -> Forecast | None:
        """What a draft is likely to be worth, where making it costs time; None: it costs next to none."""
        return None

    @abstractmethod
    def propose(self, ids: Sequence[int], most: int) -> Draft | Sequence[int]:
        """Tokens that may come after `ids`, at most so many; none for an ordinary step.

        What can't be verified is cut off: ids that the model hasn't, and ends of a text with all behind them. Plain ids
        count as certain.
        """

    def observe(self, num_verified: int, num_right: int, num_new: int) -> None:
        """What came of a step: so many new tokens; of what was proposed last, so many were verified, and the first so
        many chosen."""
        return

    def finish(self, ids: Sequence[int]) -> None:
        """The request has come to its end with these ids."""
        return


def verifiable(
    proposed: Draft | Sequence[int], most: int, *, vocab_size: int, ends: Collection[int] = ()
) -> tuple[list[int], list[float]]:
    """What can be verified of what was proposed, with its survival: ids that there are, up to the first end of a text.

    Plain ids count as certain. Raises what follows from ids that are no whole numbers.
    """
    ids, survival = (proposed.ids, proposed.survival) if isinstance(proposed, Draft) else (proposed, None)
    whole = [operator.index(token) for token in islice(ids, most)]
    left = list(takewhile(lambda token: 0 <= token < vocab_size and token not in ends, whole))
    return left, [1.0 if survival is None else float(survival[place]) for place in range(len(left))]


def drafters_of(drafts: str | Drafter | Sequence[str | Drafter]) -> list[Drafter]:
    """What is asked for by names ("suffix,model:tiny-gpthf", or "off"), by strategies, or by a list of both.

    Raises:
        InputError: there is none of that name, or the same twice.
        ConfigError, CheckpointError: what is behind a colon isn't there.
    """
    asked = [drafts] if isinstance(drafts, str | Drafter) else list(drafts)
    found: list[Drafter] = []
    for one in asked:
        if isinstance(one, Drafter):
            found.append(one)
        elif isinstance(one, str):
            found += [_named(name.strip()) for name in one.split(",") if one != "off"]
        else:
            raise InputError(f"drafts={one!r} is neither the name of a strategy nor one.")
    if len({id(drafter) for drafter in found}) < len(found):
        raise InputError("drafts names the same strategy twice.")
    return found


def _named(name: str) -> Drafter:
    kind, _, argument = name.partition(":")
    if kind not in DRAFTERS:
        raise InputError(f"drafts={name!r} is unknown.{nearest(kind, ['off', *DRAFTERS])}")
    return DRAFTERS[kind].from_argument(argument)

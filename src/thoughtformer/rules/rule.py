"""A visibility rule: which earlier entries a query may read, and so which entries a cache must hold.

A rule is stated once, by `visible`, and runs three ways that must agree (tests/parity): as a dense mask over the whole
text, as gathered blocks over the structure (`plan`), and as a cache that holds only what `keeps` keeps. Rules are
static: functions of the tokens. What was invisible once stays invisible, so dropping it changes nothing. Nothing is
read across documents.

All else that a rule says has a default that is right for every rule, and may be slower than need be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import isabstract
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from thoughtformer.attention.blocks import AttentionPlan
from thoughtformer.errors import ConfigError, nearest
from thoughtformer.rules.plans import masked_plan
from thoughtformer.rules.structure import RowCounters, TokenStructure

__all__ = ["BODY_RULES", "BodyRule", "TokenRule", "VisibilityRule", "body_rule", "dense_mask"]


class VisibilityRule(ABC):
    """Who may read whom in one stage of layers."""

    name: ClassVar[str]
    #: Cache entries are allotted in blocks of this many: small where few are held, large where all are.
    block_entries: ClassVar[int] = 16
    #: By how much blocks may grow with the cache: of use where open sentences come and go on top of many entries.
    block_growth: ClassVar[int] = 1
    #: Every token of a document stays readable to its end, so that a cache's size is known in advance.
    keeps_all: ClassVar[bool] = False
    #: Only a token that closes a sentence or starts a document makes earlier entries unreadable: other steps of
    #: decoding then needn't look at them.
    drops_at_ends_only: ClassVar[bool] = False
    #: A sentence end's output doesn't depend on this stage's states of other tokens in its sentence. Then what later
    #: stages read of a closed sentence can be kept, as the vectors of its end, for the next time that it is read.
    ends_suffice: ClassVar[bool] = False
    #: A sentence's first token may find nothing held, and does in most texts: compiled steps then begin with one entry.
    starts_empty: ClassVar[bool] = False

    @abstractmethod
    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        """Whether each query may read each key; fields broadcast against each other."""

    @abstractmethod
    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        """Whether a later query of the entry's row may still read it, `counters` being where the row now stands."""

    def needs(
        self, tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], num_layers: int
    ) -> Bool[Tensor, " tokens"]:
        """The tokens that must pass this stage of `num_layers` so that the `wanted` ones come out right."""
        return torch.ones_like(wanted)

    def all_cached_visible(self, new: TokenStructure) -> bool:
        """Whether each of `new`, one a row, may read everything that its row holds (then no mask is needed)."""
        return False

    def most_entries(self, *, num_tokens: int, num_ends: int, longest_sentence: int) -> int:
        """A bound on the entries held between steps, of a row that has read so many tokens and sentence ends.

        No sentence is longer than `longest_sentence` tokens, its end included.
        """
        return num_tokens


def dense_mask(rule: VisibilityRule, tokens: TokenStructure) -> Bool[Tensor, "tokens tokens"]:
    """`mask[i, j]`: whether token i reads token j, straight from the rule. Rows don't see each other."""
    return rule.visible(tokens.map(lambda f: f.unsqueeze(1)), tokens.map(lambda f: f.unsqueeze(0)))


class TokenRule(VisibilityRule):
    """A rule among tokens, which can attend by structure."""

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        """How to attend among `tokens` alone, by blocks instead of by a whole mask; equals `visible`."""
        return masked_plan(tokens, self.visible)


#: The rules that `GPTHFConfig.body_visibility` names.
BODY_RULES: dict[str, type[BodyRule]] = {}


class BodyRule(TokenRule):
    """A rule of a body: each subclass with a `name` of its own can be chosen by it."""

    #: Its rotary positions count tokens, whatever the configuration says of sentences.
    counts_tokens: ClassVar[bool] = False
    #: It has no use for a text without sentence ends.
    needs_sentence_ends: ClassVar[bool] = True
    #: It reads tokens of the `recent_sentences` before the query's own.
    reads_recent: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__ and not isabstract(cls):
            known = BODY_RULES.setdefault(cls.name, cls)
            # A module that is imported anew, as notebooks do, replaces its own.
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"two rules are called {cls.name!r}: {known.__qualname__} and {cls.__qualname__}.")
            BODY_RULES[cls.name] = cls

    @classmethod
    def from_config(cls, *, recent_sentences: int = 0, **settings: Any) -> BodyRule:
        """The rule by the configuration's `recent_sentences`, which those take that read them, and its settings.

        Raises:
            TypeError: settings that it doesn't take.
        """
        assert not cls.reads_recent, f"{cls.__name__} must take recent_sentences from the configuration"
        return cls(**settings)


def body_rule(name: str, settings: Mapping[str, Any] | None = None, *, recent_sentences: int = 0) -> BodyRule:
    """The body's rule by `GPTHFConfig.body_visibility` and `body_visibility_settings`; raises `ConfigError`."""
    if name not in BODY_RULES:
        raise ConfigError(f"body_visibility={name!r} is unknown.{nearest(name, BODY_RULES)}")
    rule = BODY_RULES[name]
    if recent_sentences > 0 and not rule.reads_recent:
        those = " or ".join(repr(name) for name, rule in sorted(BODY_RULES.items()) if rule.reads_recent)
        raise ConfigError(
            f"recent_sentences={recent_sentences} needs a decoder, or a body that reads tokens: "
            f"body_visibility={those}, not {name!r}."
        )
    try:
        return rule.from_config(recent_sentences=recent_sentences, **(settings or {}))
    except TypeError as error:
        raise ConfigError(f"body_visibility={name!r} can't be made of {settings}: {error}") from None

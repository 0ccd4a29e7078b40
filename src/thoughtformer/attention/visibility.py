"""Visibility rules: which earlier entries a query may read, and so which entries a cache must hold.

A rule is stated once, by `visible`, and runs three ways that must agree (tests/parity): as a dense mask over the whole
text, as gathered blocks over the structure (`plan`), and as a cache that holds only what `keeps` keeps. Rules are
static: functions of the tokens. What was invisible once stays invisible, so dropping it changes nothing.

Example, two sentences `a b .` and `c d .` where `.` closes a sentence, then an open `e` (rows: queries, columns: keys):

    causal       own sentence   fast         keep_last    hybrid
    1            1              1            1            1
    11           11             .1           11           11
    111          111            ..1          111          ..1
    1111         ...1           ..11         ..11         ..11
    11111        ...11          ..1.1        ..111        ..111
    111111       ...111         ..1..1       ..1111       ..1..1
    1111111      ......1        ..1..11      ..1..11      ..1..11

Source: arXiv 2503.11426 for "fast" and "keep_last"; "hybrid" is this project's own: the ends of sentences don't read
their sentence's inner tokens, so that only ends need to pass the body, and open sentences still see all of themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.attention.gathered import AttentionPlan, causal_plan, sentence_plan
from thoughtformer.attention.structure import RowCounters, TokenStructure
from thoughtformer.errors import ConfigError, nearest

__all__ = [
    "BODY_RULES",
    "Causal",
    "EarlierSentences",
    "Fast",
    "Hybrid",
    "KeepLast",
    "OwnSentence",
    "TokenRule",
    "VisibilityRule",
    "body_rule",
]

PositionScheme = Literal["offset", "sentence", "position"]


class VisibilityRule(ABC):
    """Who may read whom in one stage of layers."""

    name: ClassVar[str]
    #: Cache entries are allotted in blocks of this many: small where few are held, large where all are.
    block_entries: ClassVar[int] = 16
    #: By how much blocks may grow with the cache: of use where open sentences come and go on top of many entries.
    block_growth: ClassVar[int] = 1
    #: Every token of a document stays readable to its end, so that a cache's size is known in advance.
    keeps_all: ClassVar[bool] = False
    #: A sentence end's output doesn't depend on this stage's states of other tokens in its sentence.
    ends_suffice: ClassVar[bool] = False

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

    def all_held_visible(self, new: TokenStructure) -> bool:
        """Whether each of `new`, one a row, may read everything that its row holds (then no mask is needed)."""
        return False


class TokenRule(VisibilityRule):
    """A rule among tokens, which can attend by structure."""

    @abstractmethod
    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        """How to attend among `tokens` alone, by structure instead of by mask; equals `visible`."""


def _earlier(query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
    same_document = (query.row == key.row) & (query.document == key.document)
    return same_document & (key.position <= query.position)


def _in_current_document(entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
    return entry.document == counters.document[entry.row]


def _in_recent_sentences(entry: TokenStructure, counters: RowCounters, recent: int) -> Bool[Tensor, "*shape"]:
    """In the open sentence, or in one of the `recent` before it."""
    return _in_current_document(entry, counters) & (entry.sentence >= counters.sentence[entry.row] - recent)


def _sentences_back(
    tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], recent: int, num_layers: int
) -> Bool[Tensor, " tokens"]:
    """Tokens of the sentences that hold `wanted` ones, and of those that their states depend on, layer by layer."""
    sentence = _sentence_ordinal(tokens)
    is_needed = torch.zeros(len(tokens), dtype=torch.bool)
    is_needed[sentence[wanted]] = True
    if recent:
        # A later sentence of another document reaches back as far, and then computes more than it must.
        number = torch.arange(len(tokens))
        following = torch.where(is_needed, number, len(tokens) * (num_layers * recent + 2))
        nearest_wanted = following.flip(0).cummin(0).values.flip(0)
        is_needed = nearest_wanted - number <= recent * num_layers
    return is_needed[sentence]


def _starts_document(new: TokenStructure) -> bool:
    return bool(((new.position == 0) & (new.document > 0)).any())


class Causal(TokenRule):
    """Every earlier token of the document: the plain GPT."""

    name = "causal"
    block_entries = 64
    keeps_all = True

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        return _earlier(query, key)

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        return _in_current_document(entry, counters)

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        return causal_plan(_document_ordinal(tokens))

    def all_held_visible(self, new: TokenStructure) -> bool:
        return not _starts_document(new)


class OwnSentence(TokenRule):
    """Earlier tokens of the query's own sentence, and of the `recent` sentences before it.

    The word-level encoder, and what a word-level decoder reads beside summaries.
    """

    name = "own_sentence"

    def __init__(self, recent: int = 0) -> None:
        self.recent = recent

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        # Repeated sentence ends stand at positions of the next sentence's: the sentence must be asked for, too.
        is_near = (key.sentence >= query.sentence - self.recent) & (key.sentence <= query.sentence)
        return _earlier(query, key) & is_near

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        return _in_recent_sentences(entry, counters, self.recent)

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        assert not self.recent, "a decoder plans its memory along: attention.memory"
        return causal_plan(_sentence_ordinal(tokens))

    def needs(
        self, tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], num_layers: int
    ) -> Bool[Tensor, " tokens"]:
        return _sentences_back(tokens, wanted, self.recent, num_layers)

    def all_held_visible(self, new: TokenStructure) -> bool:
        return not _starts_document(new)


class EarlierSentences(VisibilityRule):
    """Summaries of earlier sentences; with `own`, a sentence end also reads its own sentence's.

    For entries that stand for sentences, while the queries are tokens: an entry's structure is its sentence end's.
    """

    name = "earlier_sentences"
    block_growth = 4

    def __init__(self, own: bool) -> None:
        self.own = own

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        same_document = (query.row == key.row) & (query.document == key.document)
        is_visible = key.sentence < query.sentence
        if self.own:
            is_visible = is_visible | (query.is_end & (key.sentence == query.sentence))
        return same_document & key.is_end & is_visible

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        return _in_current_document(entry, counters) & entry.is_end

    def all_held_visible(self, new: TokenStructure) -> bool:
        return not _starts_document(new)


class Fast(TokenRule):
    """Sentence ends, and the query itself."""

    name = "fast"
    block_growth = 4
    ends_suffice = True

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        return _earlier(query, key) & (key.is_end | (key.position == query.position))

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        return _in_current_document(entry, counters) & entry.is_end

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        return sentence_plan(tokens, self, _document_ordinal(tokens), _sentence_ordinal(tokens))

    def needs(
        self, tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], num_layers: int
    ) -> Bool[Tensor, " tokens"]:
        return wanted | tokens.is_end

    def all_held_visible(self, new: TokenStructure) -> bool:
        return not _starts_document(new)


class KeepLast(TokenRule):
    """Sentence ends, and earlier tokens of the query's own sentence and of the `recent` before it."""

    name = "keep_last"
    block_growth = 4

    def __init__(self, recent: int = 0) -> None:
        self.recent = recent

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        return _earlier(query, key) & (key.is_end | (key.sentence >= query.sentence - self.recent))

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        is_recent = _in_recent_sentences(entry, counters, self.recent)
        return is_recent | (_in_current_document(entry, counters) & entry.is_end)

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        return sentence_plan(tokens, self, _document_ordinal(tokens), _sentence_ordinal(tokens), recent=self.recent)

    def all_held_visible(self, new: TokenStructure) -> bool:
        return not _starts_document(new)


class Hybrid(KeepLast):
    """As `KeepLast`, except that a sentence end reads only sentence ends and itself."""

    name = "hybrid"
    ends_suffice = True

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        to_end = key.is_end | (key.position == query.position)
        own = ~query.is_end & (key.sentence >= query.sentence - self.recent)
        return _earlier(query, key) & (to_end | own)

    def needs(
        self, tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], num_layers: int
    ) -> Bool[Tensor, " tokens"]:
        return tokens.is_end | _sentences_back(tokens, wanted & ~tokens.is_end, self.recent, num_layers)

    def all_held_visible(self, new: TokenStructure) -> bool:
        return not _starts_document(new) and not new.has_ends


BODY_RULES: dict[str, type[TokenRule]] = {rule.name: rule for rule in (Fast, KeepLast, Hybrid, Causal)}


def body_rule(name: str, recent_sentences: int = 0) -> TokenRule:
    """The body's rule by the name that `GPTHFConfig.body_visibility` gives; raises `ConfigError`."""
    if name not in BODY_RULES:
        raise ConfigError(f"body_visibility={name!r} is unknown.{nearest(name, BODY_RULES)}")
    rule = BODY_RULES[name]
    return rule(recent_sentences) if issubclass(rule, KeepLast) else rule()


def _ordinal(*keys: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    """Counts runs of equal keys: 0 for the first run, 1 for the next, and so on."""
    changes = torch.zeros_like(keys[0])
    for key in keys:
        changes[1:] |= (key[1:] != key[:-1]).long()
    return changes.cumsum(0)


def _document_ordinal(tokens: TokenStructure) -> Int[Tensor, " tokens"]:
    return _ordinal(tokens.row, tokens.document)


def _sentence_ordinal(tokens: TokenStructure) -> Int[Tensor, " tokens"]:
    return _ordinal(tokens.row, tokens.document, tokens.sentence)

"""The rules of sentences: which earlier tokens a token may read, and which summaries.

Each draws itself for two sentences `a b .` and `c d .`, where `.` closes a sentence, and an open `e`: rows are queries,
columns keys. "fast" and "keep_last" are of arXiv 2503.11426; "hybrid" is this project's own: the ends of sentences
don't read their sentence's inner tokens, so that only ends need to pass the body, and open sentences still see all of
themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from thoughtformer.attention.blocks import AttentionPlan
from thoughtformer.rules.plans import causal_plan, sentence_plan
from thoughtformer.rules.rule import BodyRule, TokenRule, VisibilityRule
from thoughtformer.rules.structure import (
    RowCounters,
    TokenStructure,
    document_ordinal,
    in_current_document,
    in_recent_sentences,
    is_earlier,
    sentence_ordinal,
    starts_document,
)

__all__ = [
    "Causal",
    "EarlierSentences",
    "Fast",
    "Hybrid",
    "KeepLast",
    "OwnSentence",
]


def _sentences_back(
    tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], recent: int, num_layers: int
) -> Bool[Tensor, " tokens"]:
    """Tokens of the sentences that hold `wanted` ones, and of those that their states depend on, layer by layer."""
    sentence = sentence_ordinal(tokens)
    is_needed = torch.zeros(len(tokens), dtype=torch.bool)
    is_needed[sentence[wanted]] = True
    if recent:
        # A later sentence of another document reaches back as far, and then computes more than it must.
        number = torch.arange(len(tokens))
        following = torch.where(is_needed, number, len(tokens) * (num_layers * recent + 2))
        nearest_wanted = following.flip(0).cummin(0).values.flip(0)
        is_needed = nearest_wanted - number <= recent * num_layers
    return is_needed[sentence]


class Causal(BodyRule):
    """Every earlier token of the document: the plain GPT.

        a b . c d . e
    a   1
    b   11
    .   111
    c   1111
    d   11111
    .   111111
    e   1111111
    """

    name = "causal"
    block_entries = 64
    keeps_all = True
    drops_at_ends_only = True
    counts_tokens = True
    needs_sentence_ends = False

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        return is_earlier(query, key)

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        return in_current_document(entry, counters)

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        return causal_plan(document_ordinal(tokens))

    def all_cached_visible(self, new: TokenStructure) -> bool:
        return not starts_document(new)


class OwnSentence(TokenRule):
    """Earlier tokens of the query's own sentence, and of the `recent` sentences before it.

        a b . c d . e
    a   1
    b   11
    .   111
    c   ...1
    d   ...11
    .   ...111
    e   ......1

    The word-level encoder, and what a word-level decoder reads beside summaries.
    """

    name = "own_sentence"
    drops_at_ends_only = True
    starts_empty = True

    def __init__(self, recent: int = 0) -> None:
        self.recent = recent

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        # Repeated sentence ends stand at positions of the next sentence's: the sentence must be asked for, too.
        is_near = (key.sentence >= query.sentence - self.recent) & (key.sentence <= query.sentence)
        return is_earlier(query, key) & is_near

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        return in_recent_sentences(entry, counters, self.recent)

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        # With recent sentences this is a decoder's, which plans summaries along: rules.joint.
        return super().plan(tokens) if self.recent else causal_plan(sentence_ordinal(tokens))

    def needs(
        self, tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], num_layers: int
    ) -> Bool[Tensor, " tokens"]:
        return _sentences_back(tokens, wanted, self.recent, num_layers)

    def all_cached_visible(self, new: TokenStructure) -> bool:
        return not starts_document(new)

    def most_entries(self, *, num_tokens: int, num_ends: int, longest_sentence: int) -> int:
        return min((self.recent + 1) * longest_sentence, num_tokens)


class EarlierSentences(VisibilityRule):
    """Summaries of earlier sentences; with `own`, a sentence end also reads its own sentence's.

    For entries that stand for sentences, while the queries are tokens: an entry's structure is its sentence end's.
    """

    name = "earlier_sentences"
    block_growth = 4
    drops_at_ends_only = True

    def __init__(self, own: bool) -> None:
        self.own = own

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        same_document = (query.row == key.row) & (query.document == key.document)
        is_visible = key.sentence < query.sentence
        if self.own:
            is_visible = is_visible | (query.is_end & (key.sentence == query.sentence))
        return same_document & key.is_end & is_visible

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        return in_current_document(entry, counters) & entry.is_end

    def all_cached_visible(self, new: TokenStructure) -> bool:
        return not starts_document(new)

    def most_entries(self, *, num_tokens: int, num_ends: int, longest_sentence: int) -> int:
        return num_ends


class Fast(BodyRule):
    """Sentence ends, and the query itself.

        a b . c d . e
    a   1
    b   .1
    .   ..1
    c   ..11
    d   ..1.1
    .   ..1..1
    e   ..1..11
    """

    name = "fast"
    block_growth = 4
    drops_at_ends_only = True
    ends_suffice = True

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        return is_earlier(query, key) & (key.is_end | (key.position == query.position))

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        return in_current_document(entry, counters) & entry.is_end

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        return sentence_plan(tokens, self.visible)

    def needs(
        self, tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], num_layers: int
    ) -> Bool[Tensor, " tokens"]:
        return wanted | tokens.is_end

    def all_cached_visible(self, new: TokenStructure) -> bool:
        return not starts_document(new)

    def most_entries(self, *, num_tokens: int, num_ends: int, longest_sentence: int) -> int:
        return num_ends


class KeepLast(BodyRule):
    """Sentence ends, and earlier tokens of the query's own sentence and of the `recent` before it.

        a b . c d . e
    a   1
    b   11
    .   111
    c   ..11
    d   ..111
    .   ..1111
    e   ..1..11
    """

    name = "keep_last"
    block_growth = 4
    drops_at_ends_only = True
    reads_recent = True

    def __init__(self, recent: int = 0) -> None:
        self.recent = recent

    @classmethod
    def from_config(cls, *, recent_sentences: int = 0, **settings: Any) -> KeepLast:
        return cls(recent_sentences, **settings)

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        return is_earlier(query, key) & (key.is_end | (key.sentence >= query.sentence - self.recent))

    def keeps(self, entry: TokenStructure, counters: RowCounters) -> Bool[Tensor, "*shape"]:
        is_recent = in_recent_sentences(entry, counters, self.recent)
        return is_recent | (in_current_document(entry, counters) & entry.is_end)

    def plan(self, tokens: TokenStructure) -> AttentionPlan:
        return sentence_plan(tokens, self.visible, recent=self.recent)

    def all_cached_visible(self, new: TokenStructure) -> bool:
        return not starts_document(new)

    def most_entries(self, *, num_tokens: int, num_ends: int, longest_sentence: int) -> int:
        return num_ends + min((self.recent + 1) * longest_sentence, num_tokens)


class Hybrid(KeepLast):
    """As `KeepLast`, except that a sentence end reads only sentence ends and itself.

        a b . c d . e
    a   1
    b   11
    .   ..1
    c   ..11
    d   ..111
    .   ..1..1
    e   ..1..11
    """

    name = "hybrid"
    ends_suffice = True

    def visible(self, query: TokenStructure, key: TokenStructure) -> Bool[Tensor, "..."]:
        to_end = key.is_end | (key.position == query.position)
        own = ~query.is_end & (key.sentence >= query.sentence - self.recent)
        return is_earlier(query, key) & (to_end | own)

    def needs(
        self, tokens: TokenStructure, wanted: Bool[Tensor, " tokens"], num_layers: int
    ) -> Bool[Tensor, " tokens"]:
        return tokens.is_end | _sentences_back(tokens, wanted & ~tokens.is_end, self.recent, num_layers)

    def all_cached_visible(self, new: TokenStructure) -> bool:
        return not starts_document(new) and not new.has_ends

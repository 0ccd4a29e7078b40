"""What holds for every visibility rule, so that none can be added untested."""

from __future__ import annotations

import pytest
import torch

import twins
from conftest import END, START, TEXTS, close, places_of, tiny_config
from thoughtformer.attention.dense import DenseAttention
from thoughtformer.errors import ConfigError
from thoughtformer.rules import (
    BODY_RULES,
    BodyRule,
    EarlierSentences,
    OwnSentence,
    RowCounters,
    TokenRule,
    TokenStructure,
    VisibilityRule,
    body_rule,
    dense_mask,
    read_structure,
)

#: Every body rule by the settings of its twin, and what else stages go by.
RULES: dict[str, VisibilityRule] = {
    name: tiny_config(name).body_rule() if name in twins.RULES else rule() for name, rule in BODY_RULES.items()
} | {
    "own_sentence": OwnSentence(),
    "own_sentence_and_2": OwnSentence(2),
    "keep_last_and_1": body_rule("keep_last", recent_sentences=1),
    "hybrid_and_2": body_rule("hybrid", recent_sentences=2),
    "earlier_sentences": EarlierSentences(own=False),
    "earlier_sentences_and_own": EarlierSentences(own=True),
}
TOKEN_RULES = {name: rule for name, rule in RULES.items() if isinstance(rule, TokenRule)}
#: `a b .` `c d .` `e`, as each rule draws it.
DRAWN = torch.tensor([5, 6, END, 7, 8, END, 9])


def structure(ids: torch.Tensor, row: torch.Tensor | None = None) -> TokenStructure:
    return read_structure(
        ids,
        torch.zeros_like(ids) if row is None else row,
        RowCounters.zeros(1 if row is None else int(row.max()) + 1),
        sentence_end_token_id=END,
        document_start_token_id=START,
    )


def test_every_rule_has_a_twin():
    missing = set(BODY_RULES) - set(twins.RULES)
    assert not missing, f"write what {missing} may read, slowly, in a file of tests/twins: RULES = {{...}}"


@pytest.mark.parametrize("name", [*BODY_RULES, "own_sentence"])
def test_rule_is_as_drawn(name):
    """Each docstring draws the mask that it is about."""
    drawn = type(RULES[name]).__doc__ or ""
    assert "    a b . c d . e\n" in drawn, f"draw {name} for two sentences and an open one"
    rows = [line.split() for line in drawn.partition("a b . c d . e\n")[2].splitlines()[: len(DRAWN)]]
    assert [row[0] for row in rows] == ["a", "b", ".", "c", "d", ".", "e"]
    mask = dense_mask(RULES[name], structure(DRAWN))
    assert [row[1] for row in rows] == ["".join("1" if seen else "." for seen in row).rstrip(".") for row in mask]


@pytest.mark.parametrize("name", list(BODY_RULES))
def test_rule_reads_what_its_twin_says(name, text):
    tokens = structure(text)
    mask, places = dense_mask(RULES[name], tokens), places_of(text)
    for i in range(len(text)):
        start = i - int(tokens.position[i])
        document = places[start:]
        expected = [j >= start and twins.RULES[name].reads(document, i - start, j - start) for j in range(i + 1)]
        assert mask[i].tolist() == expected + [False] * (len(text) - i - 1)


@pytest.mark.parametrize("name", list(TOKEN_RULES))
@pytest.mark.parametrize("plan", ["its own", "any rule's"])
def test_plans_equal_the_mask(name, plan):
    """Over rows of all texts at once: blocks over structure, and those that are read off the mask."""
    rule = TOKEN_RULES[name]
    ids = torch.cat(list(TEXTS.values()))
    tokens = structure(ids, torch.arange(len(TEXTS)).repeat_interleave(torch.tensor([len(t) for t in TEXTS.values()])))
    generator = torch.Generator().manual_seed(0)
    shape = (3, len(ids), 2, 4)
    query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    made = rule.plan(tokens) if plan == "its own" else TokenRule.plan(rule, tokens)
    close(made.attend(query, key, value), DenseAttention(dense_mask(rule, tokens)).attend(query, key, value))


@pytest.mark.parametrize("name", list(TOKEN_RULES))
def test_plans_equal_the_mask_where_sentences_are_known(name):
    """Ends alone of many sentences, then text; beside it a document with few, and one that never ends."""
    many, few = [5, 6, END] * 150 + [7, 8, END, 5], [5, END] * 3 + [6, 7, END, 8]
    ids = torch.tensor([START, *many, START, *few, START, *many, START, 5, 6, 7])
    tokens = structure(ids)
    known = ~tokens.is_end & (tokens.sentence < 140) & (tokens.document % 2 == 1)
    tokens = tokens[~known]
    assert 0 < int(known.sum()) < len(ids)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, len(tokens), 2, 4, generator=generator, dtype=torch.float64) * 3
    rule = TOKEN_RULES[name]
    close(
        rule.plan(tokens).attend(query, key, value), DenseAttention(dense_mask(rule, tokens)).attend(query, key, value)
    )


@pytest.mark.parametrize("name", list(RULES))
def test_rule_keeps_what_a_later_token_may_read(name, text):
    """What `keeps` drops after a prefix, no later token reads; what it keeps, some continuation reads."""
    rule = RULES[name]
    for count in range(1, len(text) + 1):
        prefix = structure(text[:count])
        kept = rule.keeps(prefix, RowCounters.zeros(1).after(prefix))
        whole = torch.cat([text, torch.tensor([5, 6])])
        later = dense_mask(rule, structure(whole))[count:, :count]
        assert not (later & ~kept).any()
        at_once = dense_mask(rule, structure(torch.cat([text[:count], torch.tensor([5])])))[-1, :count]
        assert torch.equal(at_once, kept), "the next ordinary token reads all that is held"


@pytest.mark.parametrize("name", list(RULES))
def test_visibility_never_grows(name, text):
    """For ordinary queries of one document, what was invisible stays so."""
    mask = dense_mask(RULES[name], structure(text))
    tokens = structure(text)
    queries = (~tokens.is_end).nonzero().flatten().tolist()
    for earlier, later in zip(queries, queries[1:]):
        known = torch.arange(len(text)) < earlier
        assert not (mask[later] & ~mask[earlier] & known).any()


@pytest.mark.parametrize("name", list(RULES))
def test_what_a_rule_says_of_itself_is_so(name, text):
    """When a step may drop, that ends do without their sentence, that all is kept, and the bound."""
    rule, tokens = RULES[name], structure(text)
    before = torch.zeros(0, dtype=torch.bool)
    longest = num_ends = open_tokens = 0
    for count in range(1, len(text) + 1):
        prefix = structure(text[:count])
        kept = rule.keeps(prefix, RowCounters.zeros(1).after(prefix))
        is_end, starts = bool(prefix.is_end[-1]), text[count - 1] == START
        if rule.drops_at_ends_only and not is_end and not starts:
            assert torch.equal(kept[:-1], before)
        if rule.keeps_all:
            assert torch.equal(kept, prefix.document == prefix.document[-1])
        open_tokens, num_ends = (1 if starts else open_tokens + 1), num_ends + is_end
        longest = max(longest, open_tokens)
        open_tokens = 0 if is_end else open_tokens
        assert int(kept.sum()) <= rule.most_entries(num_tokens=count, num_ends=num_ends, longest_sentence=longest)
        before = kept
    if rule.ends_suffice:
        mask = dense_mask(rule, tokens)[tokens.is_end] & ~torch.eye(len(text), dtype=torch.bool)[tokens.is_end]
        assert not mask[:, ~tokens.is_end].any()


def test_settings_that_a_rule_does_not_take():
    with pytest.raises(ConfigError, match=r"'fast' can't be made of \{'window': 3\}"):
        body_rule("fast", {"window": 3})
    with pytest.raises(ConfigError, match="body_visibility='hybrid' or 'keep_last', not 'fast'"):
        body_rule("fast", recent_sentences=1)
    for name in ("recent_sentences", "name", "cls"):
        with pytest.raises(ConfigError, match="'keep_last' can't be made of"):
            body_rule("keep_last", {name: 1})


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(TypeError, match="two rules are called 'fast'"):

        class Other(BodyRule):
            name = "fast"

            def visible(self, query, key): ...

            def keeps(self, entry, counters): ...

    assert BODY_RULES["fast"].__name__ == "Fast"

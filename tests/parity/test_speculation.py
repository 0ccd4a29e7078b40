"""Uncommitted tokens: a partial commit, in every kind of compressed cache, equals having read the accepted alone."""

from __future__ import annotations

import random

import pytest
import torch

from lms import (
    FIRST_SETTINGS,
    TINY_METHODS,
    in_turn,
    longest_rows,
    random_ids,
    step_by_step,
    tiny_compressed,
    tiny_lm,
)
from thoughtformer.compression import Combiner, SentenceEnds, Sentinel
from thoughtformer.errors import InputError, UnsupportedError

LENGTH = 60


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


#: One setting of each method; one that can't take anything back refuses, which the first test sees.
CASES = sorted(case for case in FIRST_SETTINGS if not TINY_METHODS[case].can_reread)


@pytest.fixture(params=CASES)
def method(request):
    """Each method in turn."""
    return TINY_METHODS[request.param]


def equal_caches(compressed, one, other):
    """They are of the same text: the same schedule, as many entries and bytes, and both go on alike."""
    assert one.rows == other.rows
    assert one.num_entries.tolist() == other.num_entries.tolist()
    assert one.get_seq_length() == other.get_seq_length()
    assert one.num_bytes() == other.num_bytes() == compressed.cache_bytes(longest_rows(one), one.num_rows)
    more = random_ids(one.num_rows, 25, seed=5)
    close(step_by_step(compressed, more, one), step_by_step(compressed, more, other))


@pytest.mark.parametrize(("case", "family"), in_turn(TINY_METHODS))
@torch.no_grad()
def test_partial_commits_equal_reading_what_was_accepted(case, family):
    """In a row of passes of one to twelve tokens, of which each keeps none to all: events come before, at and after."""
    method = TINY_METHODS[case]
    compressed, chooser = tiny_compressed(tiny_lm(family), method), random.Random(family)
    ids = random_ids(1, LENGTH)
    cache, alone = compressed.new_cache(1), compressed.new_cache(1)
    if not cache.can_speculate:
        with pytest.raises(UnsupportedError, match=method.name):
            cache.autocommit = False
        return
    start = chooser.choice([0, 1, 9, 24])
    if start:
        compressed(ids[:, :start], cache=cache)
        step_by_step(compressed, ids[:, :start], alone)
    while start < LENGTH:
        drafted = chooser.randint(1, min(12, LENGTH - start))
        accepted = chooser.randint(0, drafted)
        cache.autocommit = False
        wrong = random_ids(1, drafted - accepted, seed=start + 100)
        logits = compressed(torch.cat([ids[:, start : start + accepted], wrong], dim=1), cache=cache).logits
        cache.commit(torch.tensor([accepted])) if accepted else cache.rollback()
        cache.autocommit = chooser.random() < 0.5
        if accepted:
            expected = step_by_step(compressed, ids[:, start : start + accepted], alone)
            close(logits[:, :accepted], expected)
        assert cache.rows == alone.rows
        assert cache.num_entries.tolist() == alone.num_entries.tolist()
        start += accepted
        if not accepted and chooser.random() < 0.5:
            cache.autocommit = True
            close(
                compressed(ids[:, start : start + 1], cache=cache).logits,
                step_by_step(compressed, ids[:, start : start + 1], alone),
            )
            start += 1
    cache.autocommit = True
    equal_caches(compressed, cache, alone)


@torch.no_grad()
def test_passes_pile_up(method):
    """Several passes before one commit, single steps and longer ones, of rows that keep different numbers of tokens."""
    compressed = tiny_compressed(tiny_lm(), method)
    ids = random_ids(3, LENGTH)
    cache = compressed.new_cache(3)
    compressed(ids[:, :20], cache=cache)
    cache.autocommit = False
    for start, end in ((20, 21), (21, 29), (29, 30), (30, 31), (31, 50)):
        close(
            compressed(ids[:, start:end], cache=cache).logits,
            compressed(ids[:, :end], use_cache=False).logits[:, start:end],
        )
    accepted = torch.tensor([0, 13, 30])
    with pytest.raises(UnsupportedError, match="commit"):
        cache.select(torch.tensor([0]))
    with pytest.raises(InputError, match="uncommitted"):
        cache.commit(torch.tensor([0, 31, 30]))
    cache.commit(accepted)
    cache.autocommit = True
    for row, count in enumerate(accepted.tolist()):
        alone = compressed.new_cache(1)
        step_by_step(compressed, ids[row : row + 1, : 20 + count], alone)
        alone.num_columns = cache.num_columns
        equal_caches(compressed, cache.fork_rows(torch.tensor([row])), alone)


@torch.no_grad()
def test_rows_read_unequal_drafts(method):
    """Drafts of different length, padded; as the engine verifies them."""
    compressed = tiny_compressed(tiny_lm(), method)
    ids = random_ids(2, 40)
    cache = compressed.new_cache(2)
    compressed(ids[:, :30], cache=cache)
    cache.autocommit = False
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 4:] = 0
    compressed(ids[:, 30:], attention_mask=mask, cache=cache)
    cache.commit(torch.tensor([3, 7]))
    cache.autocommit = True
    for row, count in ((0, 3), (1, 7)):
        alone = compressed.new_cache(1)
        step_by_step(compressed, ids[row : row + 1, : 30 + count], alone)
        alone.num_columns = cache.num_columns
        equal_caches(compressed, cache.fork_rows(torch.tensor([row])), alone)


@torch.no_grad()
def test_turning_autocommit_on_commits_with_the_next_pass(method):
    compressed, ids = tiny_compressed(tiny_lm(), method), random_ids(1, LENGTH)
    cache, alone = compressed.new_cache(1), compressed.new_cache(1)
    cache.autocommit = False
    compressed(ids[:, :40], cache=cache)
    forked = cache.fork()
    cache.autocommit = True
    compressed(ids[:, 40:], cache=cache)
    step_by_step(compressed, ids, alone)
    alone.num_columns = cache.num_columns
    equal_caches(compressed, cache, alone)
    forked.rollback()
    assert forked.num_entries.tolist() == [0]
    assert forked.is_fresh


@torch.no_grad()
def test_a_pass_that_fails_takes_nothing_uncommitted_along(method, monkeypatch):
    compressed, ids = tiny_compressed(tiny_lm(), method), random_ids(1, LENGTH)
    cache, alone = compressed.new_cache(1), compressed.new_cache(1)
    compressed(ids[:, :20], cache=cache)
    cache.autocommit = False
    compressed(ids[:, 20:35], cache=cache)
    forward = type(compressed.backbone).forward

    def failing(self, *arguments, **settings):
        forward(self, *arguments, **settings)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(type(compressed.backbone), "forward", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            compressed(ids[:, 35:50], cache=cache)
    cache.commit(torch.tensor([11]))
    cache.autocommit = True
    step_by_step(compressed, ids[:, :31], alone)
    alone.num_columns = cache.num_columns
    equal_caches(compressed, cache, alone)


@pytest.mark.parametrize("accepted", [0, 1, 4, 5, 8])
@pytest.mark.parametrize("method", [Sentinel, Combiner], ids=lambda method: method.name)
@torch.no_grad()
def test_an_end_that_is_taken_back_ends_nothing(method, accepted):
    """What a rejected token folded, old entries and accepted ones alike, stays readable, for as long as it should."""
    ends = SentenceEnds(end_ids=frozenset([7]), min_tokens=2, max_tokens=30, recent_tokens=0, start_tokens=0)
    compressed = tiny_compressed(tiny_lm(), method(policy=ends))
    ids = random_ids(1, LENGTH)
    ids[ids == 7] = 8
    ids[0, 9], ids[0, 50] = 7, 7
    cache, alone = compressed.new_cache(1), compressed.new_cache(1)
    compressed(ids[:, :15], cache=cache)
    draft = ids[:, 15:25].clone()
    draft[0, accepted] = 7
    cache.autocommit = False
    compressed(draft, cache=cache)
    assert int(cache.rows[0].next_start) > 10, "the draft folds"
    cache.commit(torch.tensor([accepted])) if accepted else cache.rollback()
    cache.autocommit = True
    step_by_step(compressed, ids[:, : 15 + accepted], alone)
    for start in range(15 + accepted, LENGTH, 9):
        new = ids[:, start : start + 9]
        close(compressed(new, cache=cache).logits, step_by_step(compressed, new, alone))
    alone.num_columns = cache.num_columns
    equal_caches(compressed, cache, alone)

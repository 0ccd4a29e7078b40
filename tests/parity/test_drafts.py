"""Drafts never change a text: not right ones, not wrong ones, not those that fail, whoever shares the batch."""

from __future__ import annotations

import logging
import random
from typing import ClassVar

import pytest
import torch

from drafting import DRAFTED, answered, requests_of, told
from lms import SERVED, random_ids, served_pair, tiny_lm
from prose import KINDS, PAGE, tiny_pair
from thoughtformer.cache.entries import BLOCK_ENTRIES, EntrySlots
from thoughtformer.compression import Full, compress
from thoughtformer.decode import Drafter, StepCosts, Suffix
from thoughtformer.decode.budget import RowCosts
from thoughtformer.engine import Engine, Scheduler, Sessions, runner_of
from thoughtformer.errors import UnsupportedError
from thoughtformer.sampling import SamplingParams


@pytest.fixture(params=[*KINDS, *DRAFTED])
def pair(request: pytest.FixtureRequest):
    return tiny_pair(**KINDS[request.param]) if request.param in KINDS else served_pair(request.param)


class Adversary(Drafter):
    """Random ids, repeated ones, ends everywhere, and ids that there aren't; more than may be."""

    def __init__(self, ends: list[int], vocab_size: int) -> None:
        self.chooser, self.ends, self.vocab_size = random.Random(7), ends, vocab_size

    def propose(self, ids, most):
        kinds = (
            lambda: self.chooser.randrange(self.vocab_size),
            lambda: self.chooser.choice(ids),
            lambda: self.chooser.choice(self.ends),
            lambda: self.chooser.choice([self.vocab_size, -1, 10**9]),
        )
        weights = self.chooser.choice([(1, 0, 0, 0), (1, 1, 1, 0), (5, 5, 5, 1), (0, 0, 1, 0)])
        return [chosen() for chosen in self.chooser.choices(kinds, weights, k=self.chooser.randint(0, most + 2))]


class Oracle(Drafter):
    """Knows the texts; errs now and then, if it is to."""

    def __init__(self, texts: list[list[int]], *, size: int = 4, errs: float = 0.0) -> None:
        self.texts, self.size, self.errs, self.chooser = texts, size, errs, random.Random(3)

    def propose(self, ids, most):
        known = next((text for text in self.texts if text[: len(ids)] == ids), ids)
        draft = known[len(ids) : len(ids) + min(self.size, most)]
        return [token if self.chooser.random() >= self.errs else self.chooser.choice(ids) for token in draft]


@pytest.mark.parametrize(
    ("pair", "max_rows"),
    [*((kind, rows) for kind in KINDS for rows in (1, 4)), *((case, (1, 4)[n % 2]) for n, case in enumerate(DRAFTED))],
    indirect=["pair"],
)
def test_texts_are_those_without_drafts(pair, max_rows):
    runner, asked = runner_of(*pair), requests_of(10)
    plain, rounds = answered(runner, asked, None, max_rows=max_rows)
    expected = told(plain)
    ends = [*runner.end_ids, *([] if runner.sentence_end is None else [runner.sentence_end])] or [0]
    texts = [request.ids for request in plain]
    for drafter in (Adversary(ends, runner.vocab_size), Oracle(texts), Oracle(texts, size=9, errs=0.3), Suffix()):
        drafted, fewer = answered(runner, asked, drafter, max_rows=max_rows)
        assert told(drafted) == expected
        if isinstance(drafter, Oracle):
            assert fewer < rounds


class Stepped(RowCosts):
    """As if a pass cost so much for up to four tokens, and twice as much for more; nothing is timed."""

    is_measured = True

    def __init__(self):
        super().__init__()
        self.is_tried = True

    def seconds(self, num_tokens):
        return 1.0 + (num_tokens > 4)

    def add(self, num_tokens, seconds):
        assert num_tokens <= 4 or num_tokens >= 8, "more than four never pays for less than twice the tokens"


class CostsOf(StepCosts):
    """The same for all numbers of rows."""

    def __init__(self, costs):
        super().__init__()
        self.costs = costs

    def of(self, num_rows):
        return self.costs


@pytest.mark.parametrize("pair", [*KINDS, *DRAFTED[::4]], indirect=True)
def test_a_budget_changes_no_text(pair):
    """Whatever it grants; and what is counted of drafts is what was verified and chosen."""
    runner, asked = runner_of(*pair), requests_of(8)
    plain, _ = answered(runner, asked, None, max_rows=3)
    for drafter, costs in (
        (Oracle([request.ids for request in plain]), CostsOf(Stepped())),
        (Suffix(), StepCosts()),
        (Suffix(most_tokens=3), None),
    ):
        drafted, _ = answered(runner, asked, drafter, max_rows=3, costs=costs)
        assert told(drafted) == told(plain)
        for request in drafted:
            usage = request.completion(None).usage
            assert 0 <= usage.accepted_draft_tokens <= usage.drafted_tokens
            assert usage.accepted_draft_tokens < usage.new_tokens


def test_a_request_may_do_without_drafts(pair):
    runner = runner_of(*pair)
    params = SamplingParams(max_new_tokens=12, ignore_end_of_text=True)
    (plain,), _ = answered(runner, [("A loop. " * 9, params, "")], None, max_rows=1)
    scheduler = Scheduler(runner, drafters=[Oracle([plain.ids])])
    both = [
        scheduler.submit("A loop. " * 9, SamplingParams(max_new_tokens=12, ignore_end_of_text=True, drafts=drafts))
        for drafts in (True, False)
    ]
    while scheduler.has_work:
        scheduler.round()
    assert both[0].ids == both[1].ids == plain.ids
    assert both[0].num_drafted > 0 == both[1].num_drafted
    counts = scheduler.stats().drafts
    assert (counts.verified.total(), counts.right.total()) == (both[0].num_drafted, both[0].num_right)
    assert counts.drafted_steps <= counts.steps


def test_steps_that_cannot_be_timed_cost_no_request(caplog):
    runner = runner_of(*tiny_pair(plain=True))
    (plain,), _ = answered(runner, [(PAGE[:90], SamplingParams(max_new_tokens=9), "")], None, max_rows=1)

    class Untimed(RowCosts):
        def measure(self, seconds_of, num_rows=1):
            raise RuntimeError("out of memory, say")

    with caplog.at_level(logging.WARNING):
        scheduler = Scheduler(runner, drafters=[Oracle([plain.ids])], costs=CostsOf(Untimed()))
        request = scheduler.submit(PAGE[:90], SamplingParams(max_new_tokens=9))
        while scheduler.has_work:
            scheduler.round()
    assert told([request]) == told([plain])
    assert len([record for record in caplog.records if "can't be timed" in record.message]) == 1


def test_a_prediction_is_read_only_where_something_drafts():
    runner, params = runner_of(*tiny_pair(plain=True)), SamplingParams(max_new_tokens=4, prediction=PAGE[:9000])
    for drafter, length in ((None, 0), (Suffix(), len(runner.encode(PAGE[: 16 * 4], start=False)))):
        scheduler = Scheduler(runner, drafters=[drafter] if drafter else [])
        assert len(scheduler.submit(PAGE[:60], params).prediction) == length


def test_nothing_is_drafted_that_there_is_no_room_for(pair):
    """The token behind a draft is chosen, too: no text grows beyond its limit, or the model's."""

    class Greedy(Drafter):
        asked: ClassVar[list[int]] = []

        def propose(self, ids, most):
            self.asked.append(len(ids) + most + 1)
            return [ids[-1]] * (most + 3)

    model, tokenizer = pair
    runner = runner_of(model, tokenizer)
    prompt = PAGE[:90]
    length = len(runner.encode(prompt)) + 9
    texts = []
    for drafter in (None, Greedy()):
        scheduler = Scheduler(runner, drafters=[drafter] if drafter else [])
        request = scheduler.submit(prompt, SamplingParams(max_new_tokens=9, ignore_end_of_text=True))
        widths, verify = [], runner.verify
        runner.verify = lambda new, cache, verify=verify, widths=widths: (
            widths.append(len(new[0])),
            verify(new, cache),
        )[1]
        while scheduler.has_work:
            before = len(request.ids)
            scheduler.round()
            assert not widths or before + widths[-1] <= length
        runner.verify = verify
        texts.append(request.ids)
    assert texts[0] == texts[1]
    assert Greedy.asked
    assert max(Greedy.asked) <= length


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "hourglass"])
def test_many_random_requests_are_answered_alike(kind):
    """Of any settings, coming and going: token for token, in float64."""
    runner, asked = runner_of(*tiny_pair(**KINDS[kind])), requests_of(250)
    plain, rounds = answered(runner, asked, None, max_rows=4)
    drafted, fewer = answered(runner, asked, Suffix(), max_rows=4)
    assert told(drafted) == told(plain)
    assert fewer < rounds


def test_a_right_draft_takes_one_step(pair):
    """So many tokens as were drafted, and one more."""
    model, tokenizer = pair
    params = SamplingParams(max_new_tokens=21, ignore_end_of_text=True)
    runner = runner_of(model, tokenizer)
    (plain,), rounds = answered(runner, [(PAGE[:120], params, "")], None, max_rows=1)
    assert rounds >= 21
    scheduler = Scheduler(runner, drafters=[Oracle([plain.ids], size=4)])
    request = scheduler.submit(PAGE[:120], params)
    tokens = []
    while scheduler.has_work:
        tokens.append(sum(event.token is not None for event in scheduler.round()))
    assert request.ids == plain.ids
    assert tokens == [1, 5, 5, 5, 5]


def test_what_is_held_is_what_was_accepted(pair):
    """A session goes on from a text that ended inside a draft, as from one written token by token."""
    model, tokenizer = pair
    runner = runner_of(model, tokenizer)
    for length in (3, 4, 6):
        params = SamplingParams(max_new_tokens=length, ignore_end_of_text=True)
        ids = {}
        for drafts in (False, True):
            sessions, drafter = Sessions(runner), None
            for number, prompt in enumerate((PAGE[:150], " And then", " She laughed.")):
                if drafts:
                    drafter = Oracle([ids[False, number] + [5, 6, 7]], size=5)
                scheduler = Scheduler(runner, drafters=[drafter] if drafter else [])
                session, request = sessions.begin("a", prompt, params)
                scheduler.enqueue([request])
                while scheduler.has_work:
                    scheduler.round()
                sessions.finish(session, request)
                ids[drafts, number] = request.ids
                assert session.num_read == len(session.ids) - 1
                runner.check_history(session.cache, session.ids[: session.num_read])
            assert drafts is False or [ids[True, n] for n in range(3)] == [ids[False, n] for n in range(3)]


@pytest.mark.parametrize("proposed", [ZeroDivisionError, [None], [5.5], 7], ids=str)
def test_a_drafter_that_fails_costs_nothing_else(pair, caplog, proposed):
    class Failing(Drafter):
        def propose(self, ids, most):
            if proposed is ZeroDivisionError:
                raise ZeroDivisionError("no draft")
            return proposed

    params = SamplingParams(max_new_tokens=9)
    expected = Engine(*pair).generate([PAGE[:80], "The ferry"], params)
    with caplog.at_level(logging.WARNING):
        drafted = Engine(*pair, drafts=Failing()).generate([PAGE[:80], "The ferry"], params)
    assert [(one.ids, one.text) for one in drafted] == [(one.ids, one.text) for one in expected]
    assert len([record for record in caplog.records if "drafts no more" in record.message]) == 2, "once a request"


def test_who_is_told_of_each_token_gets_one_at_a_time(pair):
    runner = runner_of(*pair)
    params = SamplingParams(max_new_tokens=12, ignore_end_of_text=True)
    (plain,), _ = answered(runner, [(PAGE[:120], params, "")], None, max_rows=1)
    scheduler = Scheduler(runner, drafters=[Oracle([plain.ids])])
    request = scheduler.prepare(PAGE[:120], params)
    request.follower = runner.new_follower()
    scheduler.enqueue([request])
    while scheduler.has_work:
        events = scheduler.round()
        assert len(events) <= 1
        assert all(event.context is not None for event in events)
    assert request.ids == plain.ids


def test_what_a_request_is_told_of_is_its_own(pair):
    """Not what a neighbour's draft holds for a moment."""
    runner, params, told = runner_of(*pair), SamplingParams(max_new_tokens=30, ignore_end_of_text=True), []
    (neighbour,), _ = answered(runner, [(PAGE[:90], params, "")], None, max_rows=1)
    for drafter in (None, Oracle([neighbour.ids])):
        scheduler, events = Scheduler(runner, drafters=[drafter] if drafter else []), []
        scheduler.submit(PAGE[:90], params)
        request = scheduler.prepare(PAGE[40:160], params)
        request.follower, request.on_event = runner.new_follower(), events.append
        scheduler.enqueue([request])
        while scheduler.has_work:
            scheduler.round()
        told.append([event.context for event in events])
    assert told[0] == told[1]
    assert None not in told[0]


def test_a_follower_that_fails_ends_its_request_alone(pair):
    scheduler, params = Scheduler(runner_of(*pair)), SamplingParams(max_new_tokens=6, ignore_end_of_text=True)
    other, request = scheduler.submit(PAGE[:60], params), scheduler.prepare(PAGE[40:99], params)
    request.follower = scheduler.runner.new_follower()
    request.follower.after = lambda *arguments: 1 // 0
    scheduler.enqueue([request])
    while scheduler.has_work:
        scheduler.round()
    assert (request.finish_reason, other.finish_reason) == ("error", "length")
    assert isinstance(request.error, ZeroDivisionError)


class Overwriting(EntrySlots):
    can_wait = False


class Alone(Full):
    """Its rows can't be joined, nor what they read taken back."""

    can_join = False

    def new_store(self, shape, devices):
        return Overwriting(self.entry_fields, shape, devices, block_entries=BLOCK_ENTRIES)


def test_methods_that_read_twice_refuse_drafts():
    for case in set(SERVED) - set(DRAFTED):
        model, tokenizer = served_pair(case)
        with pytest.raises(UnsupportedError, match=f"{model.method.name!r} overwrites what it drops"):
            Engine(model, tokenizer, drafts=Oracle([]))


@torch.no_grad()
def test_methods_that_cannot_refuse_by_name():
    compressed = compress(tiny_lm(), Alone())
    cache = compressed.new_cache(1)
    assert not cache.can_speculate
    with pytest.raises(UnsupportedError, match="'full' overwrites what it drops"):
        cache.autocommit = False
    compressed(random_ids(1, 12), cache=cache)
    cache.commit()
    cache.rollback()
    assert cache.get_seq_length() == 12
    _, tokenizer = tiny_pair()
    with pytest.raises(UnsupportedError, match=r"'full' overwrites what it drops.*leave drafts off"):
        Engine(compressed, tokenizer, max_rows=1, drafts=Oracle([]))
    with pytest.raises(UnsupportedError, match=r"'full' can't be batched.*max_rows=1"):
        Engine(compressed, tokenizer)

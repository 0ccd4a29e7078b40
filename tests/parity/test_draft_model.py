"""A smaller model drafts: it reads what it would read anew, chooses with the request's draws, and changes no text."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from drafting import DRAFTED, answered, requests_of, told
from lms import SERVED, served_pair, tiny_lm
from prose import KINDS, PAGE, prose, tiny_pair, tiny_tokenizer
from thoughtformer.compression import compress
from thoughtformer.decode import Drafter, DraftModel, StepCosts, Suffix
from thoughtformer.decode.budget import RowCosts
from thoughtformer.decode.draft_model import _Rates
from thoughtformer.decode.translation import translation_between
from thoughtformer.engine import Engine, Limits, Scheduler, runner_of
from thoughtformer.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from thoughtformer.sampling import Sampler, SamplingParams

#: A method of which nothing can be taken back.
REREADING = next(method for _, method in SERVED.values() if method.can_reread)
TARGETS = [*KINDS, *DRAFTED[:3]]


def target_pair(kind: str):
    return tiny_pair(**KINDS[kind]) if kind in KINDS else served_pair(kind)


def drafting_pair(kind: str):
    return tiny_pair(seed=5, **KINDS[kind])


@pytest.mark.parametrize("drafter", ["plain", "hourglass", "hybrid"])
@pytest.mark.parametrize("target", TARGETS)
def test_texts_are_those_without_drafts(target, drafter):
    runner, asked = runner_of(*target_pair(target)), requests_of(6)
    plain, _ = answered(runner, asked, None, max_rows=3)
    drafted, _ = answered(runner, asked, DraftModel(*drafting_pair(drafter), most_tokens=3), max_rows=3)
    assert told(drafted) == told(plain)


@pytest.mark.parametrize("costs", [None, StepCosts()], ids=["all", "what pays"])
def test_several_strategies_change_no_text(costs):
    runner, asked = runner_of(*tiny_pair(plain=True)), requests_of(8)
    plain, _ = answered(runner, asked, None, max_rows=3)
    both = [Suffix(), DraftModel(*drafting_pair("hourglass"))]
    drafted, _ = answered(runner, asked, both, max_rows=3, costs=costs)
    assert told(drafted) == told(plain)


@pytest.mark.parametrize("kind", ["plain", "hourglass"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_model_that_agrees_is_always_right(kind, settings, penalty):
    """The same weights, greedy or drawn: each guess is what is chosen then, so that a step makes all of its tokens."""
    model, tokenizer = tiny_pair(**KINDS[kind])
    params = SamplingParams(max_new_tokens=41, seed=3, ignore_end_of_text=True, repetition_penalty=penalty, **settings)
    scheduler = Scheduler(runner_of(model, tokenizer), drafters=[DraftModel(copy.deepcopy(model), tokenizer)])
    request = scheduler.submit(PAGE[:120], params)
    while scheduler.has_work:
        scheduler.round()
    assert request.num_drafted == request.num_right == 32
    assert scheduler.stats().rounds == 1 + 8, "a token when the prompt is read, then five a step"


@pytest.mark.parametrize(
    "pair", [("plain", "hourglass"), ("plain", "hybrid"), ("hourglass", "plain"), ("fast", "fast")]
)
def test_what_is_read_is_as_if_it_were_read_anew(pair):
    """Behind any number of new tokens, whatever was guessed before; ends of sentences come in where text tells them."""
    target, drafter = runner_of(*target_pair(pair[0])), DraftModel(*drafting_pair(pair[1]))
    reads = 0

    def guess(ids, logits, ahead):
        nonlocal reads
        reads += 1
        drafted = [*known, *([] if ahead == 0 else ids[len(ids) - ahead :])]
        if pair[1] == "plain" or ahead == 0:  # the drafter's own ends can't be seen here
            fresh = drafter.runner.read([drafted], len(drafted))[0][0]
            torch.testing.assert_close(logits, fresh, rtol=0, atol=1e-9)
        return int(logits[3:].argmax()) + 3, 0.5

    of_request = drafter.bound(target).begin(guess=guess)
    ids = target.encode(prose(700, seed=2))
    place, sizes = 1, [1, 3, 1, 5, 1, 1, 2, 60, 1, 1, 9]
    while place < len(ids):
        known = translation_between(target, drafter.runner)().of(ids[:place])
        draft = of_request.propose(ids[:place], 3)
        of_request.observe(len(draft.ids), 0, 1)
        place += sizes[reads % len(sizes)]
    assert reads > 60


@pytest.mark.parametrize(
    "text", [PAGE[:900], prose(600, seed=4), "Oh… “No.” he said.  Then\n\nMr. Who? Yes! \n a 🙂. b", ""]
)
@pytest.mark.parametrize("longest", [64, 9])
def test_ends_are_those_of_the_text_that_the_ids_make(text, longest):
    """At every length, as the tokenizer itself would have it; the ids grow by one, or by several."""
    tokenizer = tiny_tokenizer(True, longest)
    hourglass = tiny_pair(**KINDS["hourglass"])[0]
    drafter, target = runner_of(hourglass, tokenizer), runner_of(*tiny_pair(plain=True))
    ids = target.encode(text)
    for step in (1, 3):
        translation = translation_between(target, drafter)()
        for length in [*range(1, len(ids), step), len(ids)]:
            found = translation.of(ids[:length])
            assert [token for token in found if token not in translation.silent] == ids[:length]
            shown = tokenizer.backend_tokenizer.decode(ids[:length], skip_special_tokens=True)
            if target.encode(shown) == ids[:length]:  # a text's beginning may be made of other tokens
                assert found == drafter.encode(shown)


def test_a_model_without_ends_reads_none():
    target, drafter = runner_of(*tiny_pair(**KINDS["hourglass"])), runner_of(*tiny_pair(plain=True))
    ids = target.encode("One. Two. Three.")
    assert target.sentence_end in ids
    assert translation_between(target, drafter)().of(ids) == drafter.encode("One. Two. Three.")


def test_documents_start_where_they_do():
    target, drafter = runner_of(*tiny_pair(plain=True)), runner_of(*tiny_pair(**KINDS["hourglass"]))
    first, second = target.encode("One. Two."), target.encode("Three. Four.")
    found = translation_between(target, drafter)().of([*first, *second])
    assert found == [*drafter.encode("One. Two."), *drafter.encode("Three. Four.")]


def test_a_text_that_outgrows_the_drafter_goes_on_without_it():
    runner = runner_of(*tiny_pair(plain=True))
    small = tiny_pair(**KINDS["hourglass"], max_position_embeddings=96)
    params = SamplingParams(max_new_tokens=120, ignore_end_of_text=True)
    (plain,), _ = answered(runner, [(PAGE[:60], params, "")], None, max_rows=1)
    drafter = DraftModel(*small)
    verify, lengths = drafter.runner.verify, []

    def noted(ids, cache):
        lengths.append(int(cache.num_tokens.max()) + len(ids[0]))
        return verify(ids, cache)

    drafter.runner.verify = noted
    (drafted,), _ = answered(runner, [(PAGE[:60], params, "")], drafter, max_rows=1)
    assert told([drafted]) == told([plain])
    assert 80 < max(lengths) <= 96


def test_one_drafter_serves_models_that_close_sentences_and_such_that_do_not():
    """Also where both have the very same tokenizer; what it learns, it learns of both."""
    tokenizer = tiny_tokenizer()
    plain, hybrid = (runner_of(tiny_pair(**KINDS[kind])[0], tokenizer) for kind in ("plain", "hybrid"))
    drafter = DraftModel(tiny_pair(**KINDS["hourglass"], seed=5)[0], tokenizer)
    for_plain, for_hybrid = drafter.bound(plain), drafter.bound(plain).bound(hybrid)
    assert for_plain.bound(plain) is for_plain
    assert for_plain.rates is for_hybrid.rates is drafter.rates
    text = "One. Two. Three."
    ids = tokenizer.plain_ids(text)
    with_ends = tokenizer.encode_document(text, complete=False).tolist()
    silent = [bound.begin(guess=lambda *_: (5, 0.5)).translation.silent for bound in (for_plain, for_hybrid)]
    assert silent == [{tokenizer.sentence_end_token_id}, set()]
    start = tokenizer.start_token_id
    assert for_plain.begin(guess=lambda *_: (5, 0.5)).translation.of([start, *ids]) == with_ends
    assert for_hybrid.begin(guess=lambda *_: (5, 0.5)).translation.of(with_ends) == with_ends


def test_ends_that_it_writes_are_no_part_of_its_draft():
    """It reads them and goes on; behind each, its next guess is for the same place."""
    target, drafter = runner_of(*tiny_pair(plain=True)), DraftModel(*drafting_pair("hourglass"))
    end, places, written = drafter.runner.sentence_end, [], iter([9, drafter.runner.sentence_end, 10, 11])

    def guess(ids, logits, ahead):
        places.append((len(ids), ahead))
        return next(written), 0.5

    ids = target.encode(PAGE[:60])
    of_request = drafter.bound(target).begin(guess=guess)
    draft = of_request.propose(ids, 3)
    assert draft.ids == [9, 10, 11]
    assert places == [(len(ids) + ahead, ahead) for ahead in (0, 1, 1, 2)]
    assert of_request.pending[-3:] == [9, end, 10]


def test_what_came_of_a_draft_is_counted():
    target, drafter = runner_of(*tiny_pair(plain=True)), DraftModel(*drafting_pair("hourglass"))
    of_request, ids = drafter.bound(target).begin(guess=lambda *_: (9, 0.5)), target.encode(PAGE[:60])
    before = drafter.rates.of(0.5)
    for right in (0, 3):
        for _ in range(30):
            of_request.propose(ids, 3)
            of_request.observe(3, right, right + 1)
        assert (drafter.rates.of(0.5) < before) == (right == 0)
        before = drafter.rates.of(0.5)


class Failing(Drafter):
    def propose(self, ids, most):
        raise ZeroDivisionError


def test_one_that_fails_leaves_the_others(caplog):
    model, tokenizer = tiny_pair(plain=True)
    drafters = [Failing(), DraftModel(copy.deepcopy(model), tokenizer)]
    with caplog.at_level(logging.WARNING):
        (request,), _ = answered(
            runner_of(model, tokenizer), [(PAGE[:90], SamplingParams(max_new_tokens=20), "")], drafters, max_rows=1
        )
    assert request.num_right > 0
    assert [record.message for record in caplog.records] == ["Failing drafts no more for request 0"]


def test_what_each_strategy_did_is_counted_apart():
    model, tokenizer = tiny_pair(plain=True)
    scheduler = Scheduler(
        runner_of(model, tokenizer), Limits(max_rows=2), drafters=[Suffix(), DraftModel(*drafting_pair("hourglass"))]
    )
    asked = [scheduler.submit(PAGE[:90], SamplingParams(max_new_tokens=60), client="a") for _ in range(2)]
    while scheduler.has_work:
        scheduler.round()
    counts = scheduler.stats().drafts
    assert set(counts.verified) == {"suffix", "model"}
    assert counts.verified.total() == sum(request.num_drafted for request in asked)
    assert counts.right.total() == sum(request.num_right for request in asked)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_are_those_of_multinomial(temperature):
    """Seeds give the texts that they gave: looked at ahead or not."""
    for seed in range(30):
        params = SamplingParams(temperature=temperature, seed=seed)
        sampler = Sampler(params, (), torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        for place in range(4):
            for dtype in (torch.float32,):
                logits = torch.randn(50, generator=torch.Generator().manual_seed(100 * seed + place), dtype=dtype)
                probabilities = sampler.scores([1], logits).softmax(-1)
                expected = int(torch.multinomial(probabilities, 1, generator=generator))
                if place == 2:
                    assert sampler.guess([1], logits, 0)[0] == expected
                    sampler.guess([1], logits, 5)
                assert sampler.choose([1], logits) == expected


def test_guesses_agree_as_often_as_they_should():
    """With the same draws at least (1 - d) / (1 + d) of the time, and as often as the closed form says."""
    first, second = torch.tensor([0.5, 0.2, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.1, 0.3])
    ratios = torch.maximum(first[None] / first[:, None], second[None] / second[:, None])
    expected = float((1 / ratios.sum(dim=1)).sum())
    sampler, same, count = Sampler(SamplingParams(temperature=1.0, seed=1), (), torch.device("cpu")), 0, 8000
    sampler.choose([0], first.log())
    for _ in range(count):
        guessed, _ = sampler.guess([0], second.log(), 0)
        same += guessed == sampler.choose([0], first.log())
    assert abs(same / count - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    distance = float((first - second).abs().sum()) / 2
    assert expected >= (1 - distance) / (1 + distance)


def test_guesses_are_worth_what_came_of_them():
    rates = _Rates()
    for number in range(600):
        rates.add(0.9, number % 10 < 7)
        rates.add(0.1, False)
    assert rates.of(0.93) == pytest.approx(0.7, abs=0.1)
    assert rates.of(0.05) == _Rates.LEAST
    assert 0.2 < rates.mean < 0.5
    rates.took(2.0)
    rates.took(1.0)
    assert rates.seconds == pytest.approx(1.9)


class FlatCosts(StepCosts):
    """Passes of any number of tokens take a second; nothing is timed."""

    def of(self, num_rows):
        costs = RowCosts()
        costs.measure(lambda width: 1.0, num_rows)
        return costs


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_where_drafting_costs_more_than_it_saves_nothing_is_drafted(seconds):
    """But for a trial now and then."""
    model, tokenizer = tiny_pair(plain=True)
    drafter = DraftModel(*tiny_pair(**KINDS["hourglass"], seed=9))
    drafter.rates.seconds, drafter.rates.took = seconds, lambda _: None
    drafter.rates.add = lambda *_: None  # what comes of drafts changes nothing
    (request,), rounds = answered(
        runner_of(model, tokenizer),
        [(PAGE[:90], SamplingParams(max_new_tokens=100, ignore_end_of_text=True), "")],
        drafter,
        max_rows=1,
        costs=FlatCosts(),
    )
    if seconds:
        assert 4 <= request.num_drafted <= 16
        assert rounds > 80
    else:
        assert request.num_drafted > 60


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda pair: DraftModel(pair[0]), InputError, "needs its tokenizer"),
        (lambda pair: DraftModel(*pair, most_tokens=0), ConfigError, "most_tokens=0"),
        (lambda pair: DraftModel("tiny-gpd"), CheckpointError, "Did you mean 'tiny-gpt'"),
        (lambda pair: Engine(*pair, drafts=[DraftModel(*pair)]), UnsupportedError, "drafts for itself saves nothing"),
        (lambda pair: Engine(*pair, drafts="model"), InputError, "write model:NAME"),
        (lambda pair: Engine(*pair, drafts="suffix:9"), InputError, "takes nothing behind a colon"),
        (lambda pair: Engine(*pair, drafts=[3]), InputError, "drafts=3 is neither"),
        (lambda pair: Engine(*pair, drafts=[Suffix()] * 2), InputError, "the same strategy twice"),
        (lambda pair: Engine(*pair, drafts="model:tiny-gpthf"), UnsupportedError, "same tokenizer"),
        (
            lambda pair: DraftModel(compress(tiny_lm("llama"), REREADING), pair[1]),
            UnsupportedError,
            "can't draft",
        ),
    ],
)
def test_what_cannot_draft_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make(tiny_pair(plain=True))

"""Drafts that copy, against a search of all places; how much of them pays, against all ways to share it out."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thoughtformer.decode import DRAFTERS, Drafter, DraftModel, StepCosts, Suffix, drafters_of
from thoughtformer.decode.budget import GAIN, RowCosts, allotted
from thoughtformer.decode.suffix import LEAST_MATCH, LEAST_SHARE, Occurrences
from thoughtformer.errors import ConfigError, InputError
from thoughtformer.names import DRAFTER_NAMES

SMALL_IDS = st.lists(st.integers(0, 3), min_size=0, max_size=40)


def searched(texts: list[list[int]], ids: list[int], *, most_match: int, most: int) -> list[int]:
    """The best continuation by looking at every place of every text; `texts[0]` is `ids`, whose end is a loop's.

    The draft of each match length is judged on its own: tokens one by one, by how many places go on so.
    """
    best, best_promise = [], 0.0
    for matched in range(most_match, LEAST_MATCH - 1, -1):
        following = []
        for number, text in enumerate(texts):
            for place in range(len(text) - 1, 0, -1):
                if place >= matched and len(ids) >= matched and text[place - matched : place] == ids[-matched:]:
                    rest = text[place:]
                    following.append((rest * most)[:most] if number == 0 else rest[:most])
        path, promise = [], 0.0
        while len(path) < min(most, 2 * matched):
            alike = [rest for rest in following if rest[: len(path)] == path and len(rest) > len(path)]
            counts = [(sum(rest[len(path)] == other[len(path)] for other in alike), rest[len(path)]) for rest in alike]
            among = sum(rest[: len(path)] == path for rest in following)
            most_often = max((count for count, _ in counts), default=0)
            if not most_often or most_often / among < LEAST_SHARE:
                break
            path.append(next(token for count, token in counts if count == most_often))
            promise += sum(rest[: len(path)] == path for rest in following) / len(following)
        if promise > best_promise + 1e-12:
            best, best_promise = path, promise
    return best


@settings(max_examples=300, deadline=None)
@given(ids=SMALL_IDS, earlier=st.lists(SMALL_IDS, max_size=3), most=st.integers(1, 9), grown=st.integers(0, 40))
def test_what_is_copied_is_what_a_search_finds(ids, earlier, most, grown):
    strategy = Suffix(most_match=6, most_places=10_000, most_tokens=8)
    for text in earlier:
        other = strategy.begin(client="a")
        other.finish(text)
    drafter = strategy.begin(client="a")
    drafter.propose(ids[:grown], 8)  # the text grows under it
    draft = drafter.propose(ids, most)
    assert list(draft.ids) == searched([ids, *reversed(earlier)], ids, most_match=6, most=min(most, 8))
    assert len(draft.survival) == len(draft.ids)
    assert all(0 < likely <= 1 for likely in draft.survival)
    assert sorted(draft.survival, reverse=True) == draft.survival


def test_a_loop_is_gone_round():
    draft = Suffix().propose([9, 1, 2, 3, 1, 2, 3], 8)
    assert list(draft.ids) == [1, 2, 3, 1, 2, 3, 1, 2][: 2 * 3]
    assert list(Suffix().propose([5, 5, 5, 5, 5], 3).ids) == [5, 5, 5]


def test_what_one_client_wrote_is_not_copied_for_another():
    strategy, text = Suffix(), list(range(50, 80))
    strategy.begin(client="a").finish(text)
    assert list(strategy.begin(client="a").propose([7, 50, 51, 52], 4).ids) == [53, 54, 55, 56]
    assert list(strategy.begin(client="b").propose([7, 50, 51, 52], 4).ids) == []


def test_what_is_remembered_is_bounded():
    strategy, sizes = Suffix(remembered_tokens=100), []
    for first in range(0, 10_000, 30):
        strategy.begin(client="a").finish(range(first, first + 30))
        known = strategy.written_by("a")
        assert known is not None
        sizes.append(known.num_tokens)
    assert sizes[:7] == [30, 60, 90, 30, 60, 90, 30]
    assert max(sizes) <= 100
    assert list(strategy.begin(client="a").propose([first, first + 1], 1).ids) == [first + 2]
    assert list(strategy.begin(client="a").propose([0, 1], 1).ids) == []
    for number in range(200):
        strategy.begin(client=str(number)).finish([1, 2, 3])
        kept = [strategy.written_by(name) for name in ("a", *map(str, range(number + 1)))]
        assert sum(known.num_tokens for known in kept if known is not None) <= 100
    assert strategy.written_by("a") is None
    assert strategy.written_by("199") is not None
    strategy.begin(client="long").finish(range(500))
    assert strategy.written_by("199") is None
    forgetful = Suffix(remembered_tokens=0)
    forgetful.begin().finish([1, 2, 3])
    assert forgetful.written_by("") is None


def test_the_latest_of_many_places_are_looked_at():
    places = Occurrences()
    places.add([1, 2, 8] * 20 + [1, 2, 9])
    found = list(places.behind([1, 2], most_match=4, most_tokens=1, most_places=3))
    assert [(place.matched, place.follows) for place in found] == [(2, [9]), (2, [8]), (2, [8])]


def replayed(drafter: Drafter, prompt: list[int], answer: list[int], most: int) -> tuple[int, int]:
    """Passes that an answer takes when it is drafted, and the tokens verified in them."""
    ids, end, passes, verified = list(prompt), len(prompt) + len(answer), 0, 0
    whole = prompt + answer
    while len(ids) < end:
        draft = list(drafter.propose(ids, most).ids)
        right = 0
        while right < len(draft) and len(ids) + right < end - 1 and draft[right] == whole[len(ids) + right]:
            right += 1
        drafter.observe(len(draft), right, right + 1)
        ids += whole[len(ids) : len(ids) + right + 1]
        passes, verified = passes + 1, verified + 1 + len(draft)
    return passes, verified


def test_an_edit_is_mostly_copied():
    """A text said again with one word in twenty changed: four tokens a pass and more, eight verified at most."""
    chooser = random.Random(0)
    text = [chooser.randrange(3000) for _ in range(600)]
    edited = [chooser.randrange(3000) if chooser.random() < 0.05 else token for token in text]
    passes, verified = replayed(Suffix().begin(), text, edited, 7)
    assert len(edited) / passes >= 4
    assert verified / passes <= 8
    new = [chooser.randrange(3000) for _ in range(600)]
    passes, verified = replayed(Suffix().begin(), text, new, 7)
    assert passes == 600
    assert verified <= 610, "next to nothing is drafted where nothing repeats"


def test_a_copy_goes_on_behind_what_differs():
    text = list(range(100, 140))
    drafter = Suffix().begin()
    ids = [*text, *text[:6]]
    assert list(drafter.propose(ids, 4).ids) == text[6:10]
    drafter.observe(4, 2, 3)
    ids += [106, 107, 7]  # not 108
    assert list(drafter.propose(ids, 4).ids) == text[9:13]
    drafter.observe(4, 0, 1)
    ids += [8]
    assert list(drafter.propose(ids, 4).ids) == text[10:14]
    drafter.observe(0, 0, 1)
    for token in range(5):
        drafter.propose(ids := [*ids, token], 4)
        drafter.observe(0, 0, 1)
    assert list(drafter.propose(ids, 4).ids) == []


def test_promises_that_are_not_kept_count_for_less():
    strategy = Suffix()
    drafter = strategy.begin()
    ids = [1, 2, 3, 1, 2]
    first = drafter.propose(ids, 2).survival
    drafter.observe(2, 0, 1)
    second = drafter.propose(ids, 2).survival
    assert second[0] < first[0]
    for _ in range(30):
        drafter.propose(ids, 2)
        drafter.observe(2, 2, 2 + 1)
    assert drafter.propose(ids, 2).survival[0] > second[0]
    for _ in range(60):
        drafter.propose(ids, 2)
        drafter.observe(2, 0, 1)
    low = drafter.propose(ids, 2).survival[0]
    assert low < 0.4
    tried = []
    for _ in range(70):  # what isn't verified is tried again now and then
        tried.append(drafter.propose(ids, 2).survival[0])
        drafter.observe(0, 0, 1)
    assert max(tried) == first[0]


CURVES = {
    "flat": lambda n: 1.0,
    "linear": lambda n: float(n),
    "stairs": lambda n: 1.0 + n // 4,
    "memory, then arithmetic": lambda n: max(1.0, n / 9) + 0.02 * n,
}


@settings(max_examples=150, deadline=None)
@given(
    survivals=st.lists(st.lists(st.floats(0.01, 1), max_size=3), min_size=1, max_size=3),
    curve=st.sampled_from(sorted(CURVES)),
)
def test_no_other_share_yields_more_tokens_a_second(survivals, curve):
    survivals = [sorted(of, reverse=True) for of in survivals]
    seconds = CURVES[curve]

    def rate(taken) -> float:
        tokens = len(survivals) + sum(sum(of[:number]) for of, number in zip(survivals, taken, strict=True))
        return tokens / seconds(len(survivals) + sum(taken))

    found = allotted(survivals, seconds)
    best = max(rate(taken) for taken in product(*(range(len(of) + 1) for of in survivals)))
    if best > GAIN * rate([0] * len(survivals)):
        assert rate(found) == pytest.approx(best)
    else:
        assert sum(found) == 0, "so little isn't worth the risk"


def test_where_a_token_costs_a_step_nothing_is_drafted_and_where_it_costs_nothing_all():
    survivals = [[0.9, 0.8, 0.1], [], [1.0]]
    assert allotted(survivals, CURVES["flat"]) == [3, 0, 1]
    assert allotted(survivals, CURVES["linear"]) == [0, 0, 0]
    # No token survives more often than the one before it, whatever is said of it.
    assert allotted([[0.3, 1.0]], {1: 1.0, 2: 1.4, 3: 1.7}.__getitem__) == [0]


def test_what_drafting_takes_counts_too():
    flat = CURVES["flat"]
    assert allotted([[0.9, 0.8]], flat, [0.0]) == [2]
    assert allotted([[0.9, 0.8]], flat, [10.0]) == [0]
    assert allotted([[0.9, 0.2]], flat, [0.3]) == [1]
    assert allotted([[0.9], [0.9]], flat, [0.0, 10.0]) == [1, 0]


def test_rows_are_timed_apart():
    costs = StepCosts()
    costs.of(1).measure(lambda width: 1.0)
    assert costs.of(1).is_measured and not costs.of(2).is_measured
    assert costs.of(5) is costs.of(8) is not costs.of(4)
    costs.of(3).measure(lambda width: float(width), 4)
    assert [costs.of(4).seconds(width) for width in (4, 5, 7)] == [4.0, 5.0, 7.0]
    assert costs.of(1).seconds(4) == 1.0


def test_costs_between_widths_lie_on_a_line():
    costs = RowCosts()
    assert not costs.is_measured
    calls = []

    def seconds_of(width):
        calls.append(width)
        return {1: 10.0, 2: 9.0, 4: 12.0, 8: 20.0, 12: 40.0}[width] + 5 * (calls.count(width) == 1)

    costs.add(1, 5.0)
    assert not costs.is_measured
    costs.measure(seconds_of)
    found = [costs.seconds(width) for width in (1, 2, 3, 4, 6, 8, 10, 12, 13)]
    assert found == [10, 10, 11, 12, 16, 20, 30, 40, math.inf], "16 isn't tried where 12 took more than twice as long"
    for _ in range(200):
        costs.add(8, 30.0)
        costs.add(8, 1e6)
        costs.add(3, 1e6)
        costs.add(99, 1.0)
        costs.add(10, 33.0)
    assert costs.seconds(8) == pytest.approx(30, abs=0.01)
    assert costs.seconds(10) == pytest.approx(33, abs=0.01)
    assert costs.seconds(3) == 11
    assert costs.seconds(13) == math.inf


def test_beyond_what_was_timed_nothing_is_drafted():
    costs = RowCosts()
    costs.measure(lambda width: 1.0 if width <= 8 else 3.0)
    assert sum(allotted([[1.0] * 9] * 3, costs.seconds)) == 5
    assert allotted([[1.0] * 9] * 13, costs.seconds) == [0] * 13


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: drafters_of("sufix"), InputError, "drafts='sufix' is unknown.*Did you mean 'suffix'"),
        (lambda: Suffix(most_match=1), ConfigError, "most_match=1 must be a whole number of at least 2"),
        (lambda: Suffix(most_tokens=0), ConfigError, "most_tokens=0"),
        (lambda: Suffix(remembered_tokens=-1), ConfigError, "remembered_tokens=-1"),
    ],
)
def test_settings_that_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_every_strategy_is_made_by_its_name():
    assert drafters_of("off") == []
    arguments = {"model": "model:tiny-gpthf"}
    assert set(DRAFTERS) == set(DRAFTER_NAMES)
    for name, kind in DRAFTERS.items():
        (drafter,) = drafters_of(arguments.get(name, name))
        assert type(drafter) is kind
    assert [type(drafter) for drafter in drafters_of("suffix, model:tiny-gpthf")] == [Suffix, DraftModel]

"""Continuous batching: what a row writes never depends on who shares the batch, when it came, or who left."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import pytest
import torch

from conftest import SWITCHES, close, entries_expected, random_text, tiny_model
from lms import SERVED, TINY_METHODS, served_pair, tiny_compressed, tiny_lm
from prose import KINDS, PAGE, prose, tiny_pair
from thoughtformer.compression import EntryBudget, Sentinel
from thoughtformer.engine import Engine, Limits, Scheduler, SentenceStore
from thoughtformer.engine.batch import Batch
from thoughtformer.errors import (
    ConfigError,
    ContextOverflowError,
    InputError,
    OverloadedError,
    StoppedError,
    TooLargeError,
    UnsupportedError,
)
from thoughtformer.runners.opening import runner_of
from thoughtformer.sampling import SamplingParams


@pytest.fixture(params=[*KINDS, *SERVED])
def pair(request: pytest.FixtureRequest):
    return tiny_pair(**KINDS[request.param]) if request.param in KINDS else served_pair(request.param)


@pytest.fixture(params=list(KINDS))
def gpthf_pair(request: pytest.FixtureRequest):
    return tiny_pair(**KINDS[request.param])


@pytest.fixture
def seen(monkeypatch) -> dict[int, list[torch.Tensor]]:
    """The logits that each row chose from, in float64, by the row's name."""
    seen: dict[int, list[torch.Tensor]] = {}
    original = Batch._choices

    def choices(self, logits, requests):
        for request, vector in zip(requests, logits.clone(), strict=True):
            if request.num_read == len(request.ids):
                seen.setdefault(id(request), []).append(vector)
        return original(self, logits, requests)

    monkeypatch.setattr(Batch, "_choices", choices)
    return seen


def prompts_and_params(count: int, seed: int) -> list[tuple[str, SamplingParams]]:
    chooser = random.Random(seed)
    asked = []
    for number in range(count):
        prompt = prose(chooser.choice([0, 5, 80, 300, 700]), seed=number)[: chooser.randint(0, 700)]
        temperature = chooser.choice([0.0, 1.0])
        params = SamplingParams(
            max_new_tokens=chooser.randint(1, 25),
            temperature=temperature,
            seed=number,
            stop=chooser.choice([(), ("e", "a")]),
            repetition_penalty=chooser.choice([1.0, 1.3]),
        )
        asked.append((prompt, params))
    return asked


def run(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        scheduler.round()


@pytest.mark.parametrize(
    ("pair", "max_prefill_tokens"),
    [
        *((kind, most) for kind in KINDS for most in (None, 30)),
        *((case, (None, 30)[number % 2]) for number, case in enumerate(SERVED)),
    ],
    indirect=["pair"],
)
def test_rows_that_come_and_go_equal_rows_alone(pair, seen, max_prefill_tokens):
    asked = prompts_and_params(14, seed=1)
    alone = []
    for prompt, params in asked:
        scheduler = Scheduler(runner_of(*pair))
        request = scheduler.submit(prompt, params)
        run(scheduler)
        alone.append((request.ids, "".join(request.text), request.finish_reason, seen[id(request)], request))

    scheduler = Scheduler(runner_of(*pair), Limits(max_rows=5, max_prefill_tokens=max_prefill_tokens))
    chooser = random.Random(3)
    requests, cancelled, waiting = [], set(), list(asked)
    while waiting or scheduler.has_work:
        for _ in range(chooser.randint(0, 3)):
            if waiting:
                requests.append(scheduler.submit(*waiting.pop(0), client=str(chooser.randint(0, 2))))
        unfinished = [request for request in requests if request.finish_reason is None]
        if unfinished and chooser.random() < 0.1:
            request = chooser.choice(unfinished)
            scheduler.cancel(request)
            cancelled.add(request.number)
        scheduler.round()
    assert len(cancelled) < len(requests)
    for request, (ids, text, reason, logits, _) in zip(requests, alone, strict=True):
        assert request.finish_reason is not None
        if request.finish_reason == "cancelled":
            assert request.number in cancelled
            assert request.ids == ids[: len(request.ids)]
        else:
            assert (request.ids, "".join(request.text), request.finish_reason) == (ids, text, reason)
            assert len(seen[id(request)]) == len(logits)
        for mine, theirs in zip(seen.get(id(request), []), logits, strict=False):
            close(mine, theirs)
    assert_nothing_is_left(scheduler)


def assert_nothing_is_left(scheduler: Scheduler) -> None:
    stats = scheduler.stats()
    assert (stats.waiting, stats.reading, stats.running, stats.cache_bytes) == (0, 0, 0, 0)
    assert scheduler.batch.cache is None
    assert not scheduler.has_work


def test_pieces_with_a_store_equal_one_reading(tmp_path):
    """A long prompt read in pieces, some of its sentences known: the same text, and the store filled."""
    model, tokenizer = tiny_pair(**KINDS["hourglass"])
    prompt, params = prose(900, seed=4), SamplingParams(max_new_tokens=20)
    expected = Engine(model, tokenizer).generate([prompt], params)[0]
    with SentenceStore(tmp_path) as store:
        known = []
        for _ in range(2):
            scheduler = Scheduler(
                runner_of(model, tokenizer, sentences=store.of(model)), Limits(max_prefill_tokens=200)
            )
            request = scheduler.submit(prompt, params)
            run(scheduler)
            assert request.ids[request.num_prompt_tokens :] == expected.ids
            known.append(request.num_known)
        assert known[0] < known[1]
        assert known[1] > request.num_prompt_tokens / 2


def test_the_budget_is_kept(pair):
    model, tokenizer = pair
    scheduler = Scheduler(runner_of(model, tokenizer))
    asked = prompts_and_params(12, seed=5)
    requests = [scheduler.submit(prompt, params) for prompt, params in asked]
    largest = max(scheduler.admission.most_bytes([request]) for request in requests)
    for request in requests:
        scheduler.cancel(request)
    run(scheduler)

    limit = 2 * largest
    scheduler = Scheduler(runner_of(model, tokenizer), Limits(max_bytes=limit))
    requests = [scheduler.submit(prompt, params) for prompt, params in asked]
    together = 0
    while scheduler.has_work:
        scheduler.round()
        held = scheduler.stats().cache_bytes
        assert held <= scheduler.admission.most_bytes(scheduler.batch.requests) <= limit
        together = max(together, scheduler.stats().running)
    assert together > 1
    assert all(request.finish_reason in ("end_of_text", "stop_string", "length") for request in requests)
    with pytest.raises(TooLargeError, match=r"may hold \d+ bytes, but all requests together may hold 1000"):
        Scheduler(runner_of(model, tokenizer), Limits(max_bytes=1000)).submit(PAGE[:500])


@pytest.mark.parametrize("name", list(SWITCHES))
def test_a_row_holds_no_more_than_expected(name):
    """The bound that admission goes by, against the documentation's count of entries, at every length."""
    model = tiny_model(**SWITCHES[name])  # type: ignore[arg-type]
    for seed in range(3):
        ids = random_text(60, seed=seed, end_every=3.0)
        for prompt_tokens in (1, 7, 30, 59):
            most = model.model.most_entries(ids[:prompt_tokens].tolist(), 60 - prompt_tokens)
            for length in range(prompt_tokens, 61):
                held = entries_expected(model, ids[:length])
                assert held.keys() == most.keys()
                assert all(held[stage] <= most[stage] for stage in held), (length, held, most)


@pytest.mark.parametrize("kind", list(SERVED))
def test_a_compressed_row_holds_no_more_than_expected(kind):
    """The same for compressed models; exact where only the number of tokens counts."""
    model, tokenizer = served_pair(kind)
    runner = runner_of(model, tokenizer)
    ids = runner.encode(PAGE)[:160]
    with torch.no_grad():
        cache, held = model.new_cache(1), []
        for token in ids:
            runner.step([token], cache)
            held.append([int(lengths[0]) for lengths in cache.store.lengths_by_part()])
    for prompt_tokens in (1, 30, 100, 160):
        bounds = runner.most_entries(ids[:prompt_tokens], 160 - prompt_tokens).values()
        for longest, most in zip(map(max, zip(*held)), bounds, strict=True):
            assert longest == most if not model.method.reads_ids else longest <= most


def test_clients_take_turns():
    """A client with many requests doesn't keep another waiting."""
    scheduler = Scheduler(runner_of(*tiny_pair()), Limits(max_rows=1))
    order = []

    def told(name):
        return lambda event: order.append(name) if event.finish_reason is not None else None

    params = SamplingParams(max_new_tokens=2)
    for number in range(4):
        scheduler.submit("One", params, client="busy", on_event=told(f"busy{number}"))
    for name in ("x", "y"):
        scheduler.submit("Two", params, client=name, on_event=told(name))
    run(scheduler)
    assert order == ["busy0", "x", "y", "busy1", "busy2", "busy3"]


def test_a_large_request_gets_its_turn():
    """Small ones that came later don't overtake it for ever, though they would fit."""
    model, tokenizer = tiny_pair(plain=True)
    probe = Scheduler(runner_of(model, tokenizer))
    big_prompt, params = PAGE[:900], SamplingParams(max_new_tokens=4, ignore_end_of_text=True)
    limit = probe.admission.most_bytes([probe.submit(big_prompt, params)]) + 1
    scheduler = Scheduler(runner_of(model, tokenizer), Limits(max_bytes=limit))
    small = SamplingParams(max_new_tokens=30, ignore_end_of_text=True)
    first = scheduler.submit("A", small)
    scheduler.round()
    big = scheduler.submit(big_prompt, params)
    later = [scheduler.submit("B", small) for _ in range(5)]
    while first.finish_reason is None:
        scheduler.round()
    assert all(request.num_read == 0 for request in later)
    while big.finish_reason is None:
        scheduler.round()
    run(scheduler)
    assert all(len(request.ids) - request.num_prompt_tokens == 30 for request in later)


def test_a_long_prompt_does_not_keep_others_waiting():
    scheduler = Scheduler(runner_of(*tiny_pair()), Limits(max_prefill_tokens=32))
    long = scheduler.submit(PAGE[:900], SamplingParams(max_new_tokens=3))
    short = scheduler.submit("The ferry", SamplingParams(max_new_tokens=3, ignore_end_of_text=True))
    rounds = 0
    while short.finish_reason is None:
        scheduler.round()
        rounds += 1
    assert rounds == 3  # the first reads, and chooses the first token
    assert long.num_read == 3 * 32 - short.num_prompt_tokens  # both share what may be read in a round
    run(scheduler)
    assert long.finish_reason is not None


def test_limits_are_told():
    scheduler = Scheduler(runner_of(*tiny_pair()), Limits(max_rows=1, max_waiting=2))
    for _ in range(3):  # one of them can begin at once
        scheduler.submit("a")
    with pytest.raises(OverloadedError, match="3 requests wait already, and no more than 2 may"):
        scheduler.submit("a")
    scheduler.round()
    with pytest.raises(OverloadedError, match="2 requests wait already"):
        scheduler.submit("a")
    with pytest.raises(ContextOverflowError):
        scheduler.submit(PAGE, SamplingParams(max_new_tokens=100_000))
    assert scheduler.stats().waiting == 2
    for name in ("max_rows", "max_bytes", "max_waiting", "max_prefill_tokens"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            Limits(**{name: 0})


def test_cancelled_and_late_wherever_they_stand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("thoughtformer.engine.scheduler.time.monotonic", lambda: now[0])
    scheduler = Scheduler(runner_of(*tiny_pair()), Limits(max_rows=2, max_prefill_tokens=32))
    params = SamplingParams(max_new_tokens=50, ignore_end_of_text=True)
    events: list = []
    running = scheduler.submit("Once", params, deadline_seconds=10, on_event=events.append)
    reading = scheduler.submit(PAGE[:850], params)
    waiting = scheduler.submit("Later", params, deadline_seconds=5)
    other = scheduler.submit("Other", params)
    for _ in range(3):
        scheduler.round()
    assert 0 < reading.num_read < reading.num_prompt_tokens
    scheduler.cancel(reading)
    scheduler.round()
    assert (reading.finish_reason, reading.cache) == ("cancelled", None)
    now[0] += 6
    scheduler.round()
    assert waiting.finish_reason == "deadline" or waiting.num_read > 0
    now[0] += 6
    scheduler.round()
    assert running.finish_reason == "deadline"
    assert events[-1].token is None
    assert "".join(event.text for event in events) == "".join(running.text)
    scheduler.cancel(other)
    scheduler.cancel(running)  # has ended: nothing happens
    run(scheduler)
    assert running.finish_reason == "deadline"
    assert_nothing_is_left(scheduler)
    assert scheduler.stats().finished["cancelled"] >= 1


def test_a_failing_step_ends_those_in_work_alone(monkeypatch):
    model, tokenizer = tiny_pair()
    scheduler = Scheduler(runner_of(model, tokenizer), Limits(max_rows=2))
    params = SamplingParams(max_new_tokens=5, ignore_end_of_text=True)
    rows = [scheduler.submit("The ferry", params) for _ in range(3)]
    scheduler.round()
    original = model.ragged_logits
    monkeypatch.setattr(model, "ragged_logits", lambda *arguments, **more: 1 / 0)
    events = scheduler.round()
    monkeypatch.setattr(model, "ragged_logits", original)
    assert [event.finish_reason for event in events[-2:]] == ["error", "error"]
    assert all(isinstance(row.error, ZeroDivisionError) for row in rows[:2])
    run(scheduler)
    assert rows[2].finish_reason == "length"
    assert_nothing_is_left(scheduler)
    monkeypatch.setattr(model, "ragged_logits", lambda *arguments, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Engine(model, tokenizer).generate(["a"])


def test_a_prompt_that_cannot_be_read_leaves_others_alone(monkeypatch):
    """It has used up the round's tokens: the next in line waits for the next round."""
    runner = runner_of(*tiny_pair())
    read_on = runner.read_on

    def failing(ids, *arguments):
        if 77 in ids:
            raise MemoryError("too long")
        return read_on(ids, *arguments)

    monkeypatch.setattr(runner, "read_on", failing)
    scheduler = Scheduler(runner, Limits(max_prefill_tokens=4))
    bad, good = (scheduler.submit([0, one, 31, 32, 33, 34], SamplingParams(max_new_tokens=2)) for one in (77, 30))
    run(scheduler)
    assert isinstance(bad.error, MemoryError)
    assert good.error is None
    assert good.finish_reason == "length"


def test_rows_keep_what_they_held(gpthf_pair):
    """A row's cache, taken along, continues as the row would have; the batch's other rows don't notice."""
    model, tokenizer = gpthf_pair
    scheduler = Scheduler(runner_of(model, tokenizer))
    params = SamplingParams(max_new_tokens=6, ignore_end_of_text=True)
    rows = [scheduler.submit(prompt, params) for prompt in (PAGE[:200], "The ferry", PAGE[30:90])]
    rows[1].keeps_cache = True
    run(scheduler)
    kept = rows[1]
    assert kept.cache is not None
    assert kept.cache.num_rows == 1
    assert rows[0].cache is None
    with torch.no_grad():
        ids = torch.tensor([*kept.ids[kept.num_read :], 5, 6])
        logits, _ = model.ragged_logits(ids, torch.zeros(len(ids), dtype=torch.long), kept.cache)
        close(logits[-1], model(torch.tensor([[*kept.ids, 5, 6]]), use_cache=False).logits[0, -1])


def test_joined_caches_equal_one(gpthf_pair):
    """join, select and fork_rows against a batch read at once."""
    model, tokenizer = gpthf_pair
    texts = [tokenizer(text)["input_ids"] for text in (PAGE[:150], "Wait. What", PAGE[200:420])]

    def read(rows):
        cache = model.new_cache(len(rows))
        lengths = torch.tensor([len(ids) for ids in rows])
        row = torch.arange(len(rows)).repeat_interleave(lengths)
        model.ragged_logits(torch.tensor([token for ids in rows for token in ids]), row, cache)
        return cache

    with torch.no_grad():
        together, parts = read(texts), read(texts[2:])
        parts.join(read(texts[:2]))
        forked = parts.fork_rows(torch.tensor([1, 2, 0]))
        before = parts.num_bytes()
        ids, row = torch.tensor([7, 8, 9]), torch.arange(3)
        expected = model.ragged_logits(ids, row, together)[0]
        close(model.ragged_logits(ids, row, forked)[0], expected)
        assert parts.num_bytes() == before, "a fork is a copy"
        close(model.ragged_logits(ids[[2, 0, 1]], row, parts)[0], expected[[2, 0, 1]])
        forked.autocommit = False
        model.ragged_logits(ids, row, forked)
        with pytest.raises(UnsupportedError, match="join needs"):
            parts.join(forked)
        with pytest.raises(UnsupportedError, match="fork_rows needs"):
            forked.fork_rows(torch.tensor([0]))


@pytest.mark.parametrize("kind", list(SERVED))
def test_joined_compressed_caches_equal_those_alone(kind):
    """join, fork_rows, saved and restore_saved, each row against the model reading it alone."""
    model, tokenizer = served_pair(kind)
    runner = runner_of(model, tokenizer)
    texts = [runner.encode(text) for text in (PAGE[:300], "Wait. What", PAGE[200:420])]
    with torch.no_grad():
        cache = runner.read([texts[2]], 0)[1]
        cache.join(runner.read(texts[:2], 0)[1])
        forked = cache.fork_rows(torch.tensor([1, 2, 0]))
        held, before = cache.saved(), cache.num_bytes()
        ids = [7, 8, 9]
        logits = runner.step(ids, forked)
        assert cache.num_bytes() == before, "a fork is a copy"
        for row, text in enumerate(texts):
            close(logits[row], model(torch.tensor([[*text, ids[row]]]), use_cache=False).logits[0, -1])
        close(runner.step([9, 7, 8], cache), logits[[2, 0, 1]])
        restored = runner.new_cache(3)
        restored.restore_saved(held)
        assert restored.rows != cache.rows
        close(runner.step([9, 7, 8], restored), logits[[2, 0, 1]])
        for _ in range(20):
            close(runner.step([5, 6, 7], restored), runner.step([5, 6, 7], cache))
        assert restored.rows == cache.rows
    other, _ = served_pair("sentinel_plain" if kind != "sentinel_plain" else "streaming")
    with pytest.raises(UnsupportedError, match="can't be joined"):
        cache.join(other.new_cache(1))


def test_what_a_compressed_model_cannot_do(tmp_path):
    model, tokenizer = served_pair("streaming")
    with SentenceStore(tmp_path) as store, pytest.raises(UnsupportedError, match="a compressed model has none"):
        Engine(model, tokenizer, store=store)
    with pytest.raises(UnsupportedError, match="can't be compiled"):
        Scheduler(runner_of(model, tokenizer, compile=True))
    plain, tokenizer = served_pair("sentinel_plain")
    with pytest.raises(InputError, match="starts a document"):
        Scheduler(runner_of(plain, tokenizer)).submit([0, 5, 6, 0, 7])
    cut, tokenizer = served_pair("sentinel_budget")
    cut.close()
    cut = tiny_compressed(cut.model, Sentinel(policy=EntryBudget(max_entries=30, span_tokens=2, recent_tokens=3)))
    with pytest.raises(ContextOverflowError, match="max_entries=30"):
        Scheduler(runner_of(cut, tokenizer)).submit(PAGE[:300])


@pytest.mark.parametrize("kind", ["sentinel_plain", "sentinel_sentences"])
def test_a_compressed_row_tells_what_it_folds(kind):
    """The folded spans, as they are told, and what is left make up the text."""
    model, tokenizer = served_pair(kind)
    scheduler, events = Scheduler(runner_of(model, tokenizer)), []
    request = scheduler.prepare(PAGE[:200], SamplingParams(max_new_tokens=40, ignore_end_of_text=True))
    request.follower, request.on_event = scheduler.runner.new_follower(), events.append
    first, closed, rest = scheduler.runner.parts(request.ids)
    assert first + "".join(closed) + rest == PAGE[:200]
    assert len(closed) >= 3
    scheduler.enqueue([request])
    run(scheduler)
    told = [event.context for event in events]
    assert told[0].folded is None, "the prompt's are told apart"
    assert told[0].closed_sentences == len(closed)
    folded = "".join(context.folded for context in told if context.folded is not None)
    last = next(context for context in told[::-1] if context.folded is not None)
    assert len(folded) > 20
    assert (PAGE[:200] + "".join(request.text)).startswith(first + "".join(closed) + folded)
    assert last.rest is not None
    for context in told:
        assert context.held_bytes > 0
        assert context.open_tokens > 0
    assert (
        told[-1].plain_bytes
        == (len(request.ids)) * model.backbone.kv_shape(range(model.backbone.num_layers)).entry_bytes
    )


def test_threads_submit_while_rounds_run():
    scheduler = Scheduler(runner_of(*tiny_pair()), Limits(max_rows=4))
    requests, lock = [], threading.Lock()

    def submit(seed: int) -> None:
        for number in range(5):
            request = scheduler.submit(f"Number {seed}", SamplingParams(max_new_tokens=3, seed=seed, temperature=1.0))
            with lock:
                requests.append(request)
            if number == 3:
                scheduler.cancel(request)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or scheduler.has_work:
        if scheduler.wait_for_work(0.01):
            scheduler.round()
    assert len(requests) == 20
    assert all(request.finish_reason is not None for request in requests)
    assert len({request.number for request in requests}) == 20
    assert_nothing_is_left(scheduler)


def test_ended_rows_are_given_back():
    scheduler = Scheduler(runner_of(*tiny_pair()))
    request = scheduler.submit("The ferry", SamplingParams(max_new_tokens=3))
    run(scheduler)
    gone = weakref.ref(request)
    del request
    gc.collect()
    assert gone() is None


def test_a_prompt_that_cannot_be_read_is_alone_in_that(monkeypatch):
    """Prompts are read together; when that fails, each by itself, and whose fault it is ends."""
    model, tokenizer = tiny_pair()
    scheduler = Scheduler(runner_of(model, tokenizer))
    rows = [scheduler.submit(text, SamplingParams(max_new_tokens=4)) for text in ("a", "bad", "c")]
    read = model.ragged_logits

    def failing(ids, *arguments, **more):
        if any(ids[place : place + len(rows[1].ids)].tolist() == rows[1].ids for place in range(len(ids))):
            raise RuntimeError("no")
        return read(ids, *arguments, **more)

    monkeypatch.setattr(model, "ragged_logits", failing)
    run(scheduler)
    assert [row.finish_reason == "error" for row in rows] == [False, True, False]
    assert [row.ids for row in rows[::2]] == [
        [*row.ids[: row.num_prompt_tokens], *Engine(*tiny_pair()).generate([text], row.params)[0].ids]
        for text, row in zip(("a", "c"), rows[::2], strict=True)
    ]
    assert_nothing_is_left(scheduler)


def test_what_a_compressed_session_belongs_to():
    """Whatever changes what is held changes its identity."""
    names = set()
    for change in ({}, {"rope_theta": 5e5}, {"rms_norm_eps": 1e-3}):
        model, tokenizer = served_pair("sentinel_sentences")
        for name, value in change.items():
            setattr(model.config, name, value)
        names.add(runner_of(model, tokenizer).identity())
    model, tokenizer = served_pair("sentinel_sentences")
    names.add(runner_of(model.to(torch.float32), tokenizer).identity())
    model, tokenizer = served_pair("sentinel_sentences")
    model.config.allow_extrapolation = True
    names.add(runner_of(model, tokenizer).identity())
    assert len(names) == 4
    with pytest.raises(UnsupportedError, match="learned positions, none beyond 200"):
        tiny_compressed(tiny_lm("gpt2"), TINY_METHODS["streaming"], allow_extrapolation=True)


def test_a_row_that_cannot_choose_is_alone_in_that(monkeypatch):
    scheduler = Scheduler(runner_of(*tiny_pair()))
    events: list = []
    params = SamplingParams(max_new_tokens=4, ignore_end_of_text=True)
    requests = [scheduler.submit(text, params, on_event=events.append) for text in ("a", "b")]
    failing = scheduler.submit("c", SamplingParams(max_new_tokens=4, temperature=1.0), on_event=events.append)

    def choose(ids, logits):
        raise RuntimeError("probability tensor contains nan")

    monkeypatch.setattr(failing.sampler, "choose", choose)
    run(scheduler)
    assert failing.finish_reason == "error"
    assert isinstance(failing.error, RuntimeError)
    assert [request.finish_reason for request in requests] == ["length", "length"]
    assert sum(event.finish_reason is not None for event in events) == 3
    assert_nothing_is_left(scheduler)


def test_a_row_that_has_ended_is_told_even_if_the_round_fails(monkeypatch):
    """Its last token was chosen, but leaving the batch failed before anybody heard of it."""
    scheduler = Scheduler(runner_of(*tiny_pair()))
    events: list = []
    request = scheduler.submit("a", SamplingParams(max_new_tokens=1, ignore_end_of_text=True), on_event=events.append)
    original = Batch.drop_ended
    monkeypatch.setattr(Batch, "drop_ended", lambda self: original(self) if not self.requests else 1 / 0)
    scheduler.round()
    assert [event.finish_reason for event in events] == ["error"]
    assert request.is_told


def test_all_rows_of_a_request_or_none():
    scheduler = Scheduler(runner_of(*tiny_pair()), Limits(max_rows=2, max_waiting=2))
    requests = [scheduler.prepare("a", SamplingParams(max_new_tokens=2)) for _ in range(5)]
    with pytest.raises(TooLargeError, match="5 completions at once, but 4 may be in work"):
        scheduler.enqueue(requests)
    assert not scheduler.has_work
    scheduler.enqueue(requests[:4])  # two can begin at once, two wait
    with pytest.raises(OverloadedError):
        scheduler.enqueue(requests[4:])
    run(scheduler)
    scheduler.close()
    with pytest.raises(StoppedError, match="has stopped"):
        scheduler.enqueue(requests[4:])

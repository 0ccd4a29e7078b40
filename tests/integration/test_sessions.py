"""Sessions: contexts that go on between requests, leave memory, come back from disk, and are refused when damaged."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from lms import served_pair
from prose import KINDS, PAGE, prose, tiny_pair
from thoughtformer.engine import Scheduler, Sessions
from thoughtformer.errors import BusyError, CheckpointError, ContextOverflowError, OutputError
from thoughtformer.runners.opening import runner_of
from thoughtformer.sampling import SamplingParams

PARAMS = SamplingParams(max_new_tokens=8, ignore_end_of_text=True)


def sessions_of(model, tokenizer, **settings) -> Sessions:
    return Sessions(runner_of(model, tokenizer), **settings)


def turn(sessions: Sessions, name: str, prompt: str, params: SamplingParams = PARAMS) -> list[int]:
    """One request on a session; the tokens that it wrote."""
    scheduler = Scheduler(sessions.runner)
    session, request = sessions.begin(name, prompt, params)
    scheduler.enqueue([request])
    while scheduler.has_work:
        scheduler.round()
    sessions.finish(session, request)
    sessions.make_room()
    return request.ids[request.num_prompt_tokens :]


@pytest.fixture(params=[*KINDS, "sentinel_plain", "sentinel_sentences", "random"])
def pair(request: pytest.FixtureRequest):
    return tiny_pair(**KINDS[request.param]) if request.param in KINDS else served_pair(request.param)


def test_from_memory_and_from_disk_alike(pair, tmp_path):
    """Three turns: held all the time, saved in between, and by another process's eyes."""
    model, tokenizer = pair
    prompts = [PAGE[:150], " And then", " She laughed. But"]
    held = sessions_of(model, tokenizer)
    expected = [turn(held, "a", prompt) for prompt in prompts]
    saved = sessions_of(model, tokenizer, folder=tmp_path, max_bytes=1)
    assert [turn(saved, "a", prompt) for prompt in prompts] == expected
    assert saved.num_cached() == saved.num_bytes() == 0
    assert turn(sessions_of(model, tokenizer, folder=tmp_path), "a", " Once more") == turn(held, "a", " Once more")
    assert [file.suffix for file in tmp_path.iterdir()] == [".session"]
    assert "a" not in next(tmp_path.iterdir()).stem.split("-")


def test_only_what_is_new_is_read(pair):
    model, tokenizer = pair
    sessions = sessions_of(model, tokenizer)
    turn(sessions, "a", PAGE[:200])
    _, request = sessions.begin("a", " And", PARAMS)
    new = sessions.runner.encode(" And", start=False)
    assert request.num_prompt_tokens - request.num_read == 1 + len(new), "the last token written was never read"
    assert request.num_known == request.num_read


def test_end_of_text_is_no_part_of_a_session(pair):
    """After it another document would begin, which doesn't see this one."""
    model, tokenizer = pair
    sessions = sessions_of(model, tokenizer)
    session, request = sessions.begin("a", PAGE[:60], SamplingParams(max_new_tokens=8))
    scheduler = Scheduler(runner_of(model, tokenizer))
    scheduler.enqueue([request])
    scheduler.round()
    scheduler.batch.choose = lambda logits, requests: [request.accept(0) for request in requests]  # type: ignore[method-assign]
    scheduler.round()
    sessions.finish(session, request)
    assert request.finish_reason == "end_of_text"
    assert 0 not in session.ids[1:]
    _, request = sessions.begin("a", "", PARAMS)
    assert request.num_prompt_tokens == len(session.ids)


def test_what_fails_leaves_the_session_as_it_was(pair):
    model, tokenizer = pair
    sessions = sessions_of(model, tokenizer)
    turn(sessions, "a", PAGE[:100])
    undisturbed = sessions_of(model, tokenizer)
    turn(undisturbed, "a", PAGE[:100])
    scheduler = Scheduler(runner_of(model, tokenizer))
    session, request = sessions.begin("a", " Never mind", PARAMS)
    with pytest.raises(BusyError, match="'a' is under way"):
        sessions.begin("a", " Impatient", PARAMS)
    with pytest.raises(BusyError):
        sessions.delete("a")
    scheduler.enqueue([request])
    scheduler.round()
    scheduler.cancel(request)
    scheduler.round()
    sessions.finish(session, request)
    # A request that isn't waited for: it goes on with a copy.
    session, request = sessions.begin("a", " Gone", PARAMS)
    scheduler.enqueue([request])
    scheduler.round()
    sessions.finish(session, request)
    while scheduler.has_work:
        scheduler.round()
    with pytest.raises(ContextOverflowError):
        sessions.begin("a", PAGE, PARAMS)
    assert turn(sessions, "a", " And then") == turn(undisturbed, "a", " And then")
    assert sessions.delete("a")
    assert not sessions.delete("a")
    assert sessions.num_cached() == 0


def test_idle_sessions_leave_memory(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("thoughtformer.engine.sessions.time.monotonic", lambda: now[0])
    sessions = sessions_of(*tiny_pair(), folder=tmp_path, idle_seconds=60)
    for name in ("a", "b"):
        turn(sessions, name, "The ferry")
        now[0] += 40
    sessions.save_idle()
    assert sessions.num_cached() == 1
    assert sessions.has("a")
    assert sessions.has("b")
    assert not sessions.has("c")
    sessions.close()
    assert len(list(tmp_path.iterdir())) == 2
    # Without a folder nothing can be saved: what is idle stays, and goes for want of memory alone.
    lost = sessions_of(*tiny_pair(), max_bytes=1)
    turn(lost, "a", "The ferry")
    assert lost.num_cached() == 0


def test_what_cannot_be_used_is_refused(tmp_path):
    model, tokenizer = tiny_pair()
    sessions = sessions_of(model, tokenizer, folder=tmp_path, max_bytes=1)
    turn(sessions, "a", PAGE[:100])
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    other, _ = tiny_pair()
    other.model.norm.weight.data += 1
    with pytest.raises(CheckpointError, match="written by something else: model was"):
        turn(sessions_of(other, tokenizer, folder=tmp_path), "a", "b")
    with pytest.raises(CheckpointError, match="written by something else: model was"):
        turn(sessions_of(tiny_pair()[0].float(), tokenizer, folder=tmp_path), "a", "b")
    for changes in ({"body_visibility": "fast"}, {"rope_theta": 500.0}):
        with pytest.raises(CheckpointError, match="written by something else: model was"):
            turn(sessions_of(tiny_pair(**changes)[0], tokenizer, folder=tmp_path), "a", "b")
    flipped = bytearray(whole)
    flipped[-9] ^= 1  # within the last tensor's values
    for damaged in (
        bytes(flipped),
        whole[:-10],
        whole[:50],
        b"",
        b"no safetensors file at all",
        whole.replace(b"num_read", b"num_dear"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            turn(sessions, "a", "b")
    assert sessions.delete("a")
    assert len(turn(sessions, "a", "b")) == 8
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't keep sessions"):
        sessions_of(model, tokenizer, folder=tmp_path / "file")


def test_weights_that_change_end_sessions(pair, tmp_path, caplog):
    """In memory as on disk: what some weights computed, others don't go on with, nor sign as theirs."""
    model, tokenizer = pair
    sessions = sessions_of(model, tokenizer, folder=tmp_path)
    turn(sessions, "a", PAGE[:100])
    weight = next(weight for name, weight in sessions.runner.model.named_parameters() if name.endswith("norm.weight"))
    weight.data.neg_()
    with pytest.raises(CheckpointError, match="weights have changed since session 'a'"):
        turn(sessions, "a", " And")
    sessions.close()
    assert list(tmp_path.iterdir()) == []
    assert "weights have changed" in caplog.text
    weight.data.neg_()
    assert len(turn(sessions, "a", " And")) == 8
    sessions.close()
    assert len(list(tmp_path.iterdir())) == 1
    weight.data.neg_()
    with pytest.raises(CheckpointError, match="model was"):
        turn(sessions, "a", " And")


def test_a_file_serves_its_own_session_alone(tmp_path):
    """Whoever moves files about doesn't move one user's text into another's session."""
    model, tokenizer = tiny_pair()
    sessions = sessions_of(model, tokenizer, folder=tmp_path, max_bytes=1)
    turn(sessions, "a", PAGE[:100])
    (file,) = tmp_path.iterdir()
    turn(sessions, "b", PAGE[100:300])
    (other,) = set(tmp_path.iterdir()) - {file}
    whole = other.read_bytes()
    other.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="session was"):
        turn(sessions, "b", " And")
    other.write_bytes(whole)
    assert len(turn(sessions, "b", " And")) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_survives_being_killed_in_a_write(tmp_path):
    """A process that saves sessions is killed again and again: each loads as some turn left it, or isn't there."""
    model, tokenizer = tiny_pair()
    expected = sessions_of(model, tokenizer)
    turn(expected, "a", PAGE[:150])
    after_one = turn(expected, "a", " And then")
    kept = sessions_of(model, tokenizer, folder=tmp_path)
    turn(kept, "a", PAGE[:150])
    session = next(iter(kept._cached.values()))
    loaded = 0
    for attempt in range(int(os.environ.get("THOUGHTFORMER_KILLS", "15"))):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                while True:
                    kept._save(session.key, session.ids, session.num_read, session.cache)
                    os.write(tell, b".")
            finally:
                os._exit(1)
        os.close(tell)
        os.read(told, 1)
        time.sleep(random.Random(attempt).uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        assert turn(sessions_of(model, tokenizer, folder=tmp_path), "a", " And then") == after_one
        loaded += 1
        assert len(list(tmp_path.iterdir())) == 1, "drafts are cleared away"
    assert loaded


def test_a_full_disk_costs_no_session(tmp_path, monkeypatch, caplog):
    sessions = sessions_of(*tiny_pair(), folder=tmp_path, max_bytes=1)

    def full(*saved) -> None:
        raise OutputError("couldn't write: no space left on device")

    monkeypatch.setattr(sessions, "_save", full)
    first = turn(sessions, "a", "The ferry")
    assert sessions.num_cached() == 1
    assert "no space left" in caplog.text
    sessions.close()
    monkeypatch.undo()
    assert len(first) == len(turn(sessions, "a", " went")) == 8
    assert sessions.num_cached() == 0


def test_many_sessions_side_by_side():
    sessions = sessions_of(*tiny_pair())
    scheduler = Scheduler(sessions.runner)
    begun = [sessions.begin(str(number), prose(80, seed=number), PARAMS) for number in range(5)]
    for _, request in begun:
        scheduler.enqueue([request])
    while scheduler.has_work:
        scheduler.round()
    for session, request in begun:
        sessions.finish(session, request)
    alone = sessions_of(*tiny_pair())
    for number, (_, request) in enumerate(begun):
        assert request.ids[request.num_prompt_tokens :] == turn(alone, str(number), prose(80, seed=number))
    again = [sessions.begin(str(number), " Yes", PARAMS) for number in range(5)]
    for _, request in again:
        scheduler.enqueue([request])
    while scheduler.has_work:
        scheduler.round()
    for number, (_, request) in enumerate(again):
        assert request.ids[request.num_prompt_tokens :] == turn(alone, str(number), " Yes")

"""The calls of the front page: one line each, and what they refuse."""

from __future__ import annotations

import os

import pytest
import torch

import thoughtformer
from lms import served_pair, tiny_compressed
from prose import KINDS, PAGE, tiny_pair
from thoughtformer import Engine, SamplingParams, SentenceStore, generate
from thoughtformer.compression import Callback, Sentinel
from thoughtformer.errors import ArgumentError, BusyError, CheckpointError, InputError, UnsupportedError

PARAMS = SamplingParams(max_new_tokens=9, ignore_end_of_text=True)


@pytest.fixture(params=[*KINDS, "sentinel_plain", "streaming"])
def pair(request: pytest.FixtureRequest):
    return tiny_pair(**KINDS[request.param]) if request.param in KINDS else served_pair(request.param)


def test_one_call(pair, tmp_path):
    model, tokenizer = pair
    expected = Engine(model, tokenizer).generate([PAGE[:90]], PARAMS)[0]
    told = generate(model, tokenizer, PAGE[:90], max_new_tokens=9, ignore_end_of_text=True)
    assert (told.ids, told.text, told.usage) == (expected.ids, expected.text, expected.usage)
    with pytest.raises(ArgumentError, match="Did you mean 'temperature'"):
        generate(model, tokenizer, "a", temprature=1.0)


def test_one_call_with_a_store(tmp_path):
    model, tokenizer = tiny_pair()
    plain = generate(model, tokenizer, PAGE[:300], max_new_tokens=9)
    with SentenceStore(tmp_path) as store:
        for known in (False, True):
            told = generate(model, tokenizer, PAGE[:300], store=store, max_new_tokens=9)
            assert told.ids == plain.ids
            assert (told.usage.cached_prompt_tokens > 0) == known


def test_a_session_goes_on(pair, tmp_path):
    """In one engine, and in another process's; as one text read whole."""
    model, tokenizer = pair
    engine, text = Engine(model, tokenizer, session_folder=tmp_path / "kept"), PAGE[:120]
    with engine.session("chat-1") as session:
        first = session.generate(text, PARAMS)
        session.save()
    (file,) = (tmp_path / "kept").iterdir()
    other = Engine(model, tokenizer, session_folder=tmp_path / "kept")
    for going_on in (engine, other):
        with going_on.session("chat-1") as session:
            second = session.generate(" And then", PARAMS)
        assert second.usage.cached_prompt_tokens > 0
        ids = [*engine.runner.encode(text), *first.ids, *engine.runner.encode(" And then", start=False)]
        assert second.ids == engine.generate([ids], PARAMS)[0].ids
    file.write_bytes(file.read_bytes()[:-9])
    damaged = Engine(model, tokenizer, session_folder=tmp_path / "kept")
    with damaged.session("chat-1") as session, pytest.raises(CheckpointError, match="Delete the session"):
        session.generate(" And", PARAMS)


def test_what_a_session_refuses(tmp_path):
    model, tokenizer = tiny_pair()
    engine = Engine(model, tokenizer, session_folder=tmp_path)
    with engine.session("a") as session:
        with pytest.raises(InputError, match="there is no session 'a'"):
            session.save()
        session.generate("The ferry", PARAMS)
        engine._sessions.begin("a", " left", PARAMS)
        with pytest.raises(BusyError, match="session 'a'"):
            session.generate(" left", PARAMS)
        session.save()
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        with pytest.raises(CheckpointError, match="weights have changed"):
            session.save()


def test_a_session_of_a_callback_is_not_written(tmp_path):
    model, tokenizer = served_pair("sentinel_plain")
    model.close()
    policy = Callback(choose=lambda row, num_raw: 0)
    compressed = tiny_compressed(model.model, Sentinel(policy=policy))
    engine = Engine(compressed, tokenizer, session_folder=tmp_path)
    with engine.session("a") as session:
        session.generate(PAGE[:60], PARAMS)
        with pytest.raises(UnsupportedError, match="can't be saved"):
            session.save()
    assert engine._sessions.has("a") and not list(tmp_path.iterdir())


def test_what_another_process_writes_stays(tmp_path):
    """Opening the folder of sessions removes what killed processes left, and nothing else."""
    (tmp_path / f".a.session.writing-{os.getpid()}-1").write_bytes(b"half")
    (tmp_path / ".b.session.writing-99999999-1").write_bytes(b"half")
    with Engine(*tiny_pair(), session_folder=tmp_path).session("c"):
        pass
    assert [path.name[:3] for path in tmp_path.iterdir()] == [".a."]


def test_what_the_package_offers():
    assert thoughtformer.__all__ == sorted(thoughtformer.__all__, key=lambda name: (name[0].islower(), name))
    for name in thoughtformer.__all__:
        assert getattr(thoughtformer, name) is not None

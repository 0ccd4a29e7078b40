"""Indexing documents, and the commands for stores."""

from __future__ import annotations

import json
import sqlite3

import pytest
import torch

from prose import PAGE, prose, tiny_pair
from thoughtformer.cli.store import parse_size
from thoughtformer.engine import Engine, SentenceStore
from thoughtformer.errors import InputError, OutputError
from thoughtformer.sampling import SamplingParams
from thoughtformer.stores.indexing import index_documents
from thoughtformer.stores.vectors import FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, one that keeps no vectors, and documents."""
    place = tmp_path_factory.mktemp("indexing")
    for name, plain in (("gpthf", False), ("gpt", True)):
        model, tokenizer = tiny_pair(plain=plain)
        model.float().save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "docs").mkdir()
    for number in range(3):
        (place / "docs" / f"{number}.txt").write_text(prose(2000, seed=number), encoding="utf-8")
    return place


@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
def test_prompts_of_indexed_text_are_known(tmp_path, batch_tokens):
    model, tokenizer = tiny_pair()
    model.config.allow_extrapolation = True  # a document may be longer than any prompt
    documents = [prose(1500, seed=1), prose(700, seed=2) + " \n", "", PAGE[:300]]
    told = []
    with SentenceStore(tmp_path) as store:
        result = index_documents(model, tokenizer, store, documents, batch_tokens=batch_tokens, on_progress=told.append)
        assert result.documents == 4
        assert result.tokens == sum(len(tokenizer.encode_document(text, complete=True)) for text in documents)
        ids = [tokenizer.encode_document(text, complete=True) for text in documents]
        assert result.sentences == sum(int((each == 1).sum()) for each in ids)
        assert result.new_vectors == store.stats().sentences < result.sentences
        assert told[-1] == result
        assert (len(told) == 1) == (batch_tokens > result.tokens)
        again = index_documents(model, tokenizer, store, documents)
        assert again.new_vectors == 0
        assert again.sentences == result.sentences

        engine, plain = Engine(model, tokenizer, store=store), Engine(model, tokenizer)
        params = SamplingParams(max_new_tokens=12)
        known, read = engine.generate(documents, params), plain.generate(documents, params)
        assert [completion.ids for completion in known] == [completion.ids for completion in read]
        for completion, text in zip(known, documents, strict=True):
            ids = tokenizer(text)["input_ids"]
            ends = [index for index, token in enumerate(ids) if token in (0, 1)]
            assert completion.usage.cached_prompt_tokens == ends[-1] + 1
        assert all(completion.usage.cached_prompt_tokens == 0 for completion in read)


def test_commands(run, folder, tmp_path):
    store = tmp_path / "store"
    arguments = ["--model", folder / "gpthf", "--store", store]
    code, out, _ = run("index", folder / "docs", *arguments, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["documents"] == 3
    assert 0 < result["new_vectors"] <= result["sentences"] + 1
    code, _, err = run("index", folder / "docs" / "0.txt", folder / "docs" / "1.txt", *arguments)
    assert code == 0
    assert "2 documents" in err
    assert ": 0 vectors new" in err.replace("\n", " ")

    prompt = ["--prompt", "The ferry", "--max-new-tokens", 8, "--allow-extrapolation", "--json"]
    prompt += ["--context-file", folder / "docs" / "2.txt"]
    _, known, _ = run("generate", *arguments, *prompt)
    _, read, _ = run("generate", *arguments[:2], *prompt)
    assert json.loads(known)["text"] == json.loads(read)["text"]
    assert json.loads(known)["usage"]["cached_prompt_tokens"] > 400
    assert json.loads(read)["usage"]["cached_prompt_tokens"] == 0

    code, out, _ = run("store", "stats", store)
    assert code == 0
    assert "torch.float32" in out
    stats = json.loads(run("store", "stats", store, "--json")[1])
    assert stats["sentences"] > 10
    assert run("store", "verify", store)[:2] == (0, f"{stats['sentences']} sentences, 0 damaged\n")
    fingerprint = stats["models"][0]["fingerprint"]
    assert run("store", "prune", store, "--keep", fingerprint)[1].startswith("0 sentences removed")
    code, _, err = run("store", "prune", store, "--keep", "feed")
    assert (code, fingerprint in err) == (2, True)
    assert run("store", "prune", store)[0] == 2
    connection = sqlite3.connect(store / FILE)
    connection.execute("UPDATE sentences SET checksum = checksum + 1 WHERE rowid = 3")
    connection.commit()
    connection.close()
    assert run("store", "verify", store)[0] == 1
    assert "sentences removed" in run("store", "prune", store, "--max-size", "20KB")[1]
    assert json.loads(run("store", "stats", store, "--json")[1])["sentences"] < stats["sentences"]


def test_mistakes(run, folder, tmp_path):
    for arguments, told in [
        (
            ["index", folder / "docs", "--model", folder / "gpt", "--store", tmp_path / "a"],
            "has no vectors of sentences",
        ),
        (["index", folder / "none", "--model", folder / "gpthf", "--store", tmp_path / "a"], "no file or folder"),
        (["index", folder / "docs", "--store", tmp_path / "a", "--max-size", "big"], "'big' is no size"),
        (["store", "stats", tmp_path / "nowhere"], "holds no sentence store"),
        (["generate", "--model", folder / "gpt", "--prompt", "A", "--store", tmp_path / "a"], "has no vectors"),
        (["generate", "--prompt", "A", "--store", tmp_path / "a", "--adapter", "tiny-gpt-sentinel"], "--store keeps"),
    ]:
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert told in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("20KB", 20_000), ("1.5 MB", 1_500_000), ("8GiB", 8 << 30), ("1tb", 10**12), ("7B", 7), (None, None)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "5 XB", "5 MBB", "1e3"])
def test_wrong_sizes(text):
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    """Nothing is lost but what was being written."""
    model, tokenizer = tiny_pair()
    with SentenceStore(tmp_path) as store:
        index_documents(model, tokenizer, store, [prose(300, seed=1)])
        before = store.stats().sentences
        pages = store._opened().execute("PRAGMA page_count").fetchone()[0]
        store._opened().execute(f"PRAGMA max_page_count={pages}")
        source = store.of(model)
        with pytest.raises(OutputError, match="full"):
            source.add([b"%d" % number for number in range(500)], torch.zeros(500, *source.shape))
        assert store.stats().sentences == before
        assert store.verify() == 0

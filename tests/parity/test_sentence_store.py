"""A sentence found in the store is as good as one read: the same logits, then and ever after; and nothing stale."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import (
    END,
    PAD,
    RESTLESS,
    START,
    SWITCHES,
    VOCAB,
    check_last_logits_of_pieces,
    close,
    full_logits,
    random_text,
    tiny_model,
)
from thoughtformer.errors import ConfigError, InputError, OutputError, StoreError, UnsupportedError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.fingerprint import encoder_fingerprint
from thoughtformer.rules import BODY_RULES
from thoughtformer.stores.model_sentences import StoredSentences
from thoughtformer.stores.sentences import SentenceStore
from thoughtformer.stores.vectors import FILE, MIB

STORABLE: dict[str, dict[str, object]] = {
    name: {"visibility": name}
    for name in (*BODY_RULES, "hourglass")
    if name == "hourglass" or BODY_RULES[name].ends_suffice
} | {name: changes for name, changes in SWITCHES.items() if changes["visibility"] != "keep_last"}


@pytest.fixture(params=list(STORABLE))
def storable(request: pytest.FixtureRequest) -> GPTHFForCausalLM:
    return tiny_model(**STORABLE[request.param])  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path):
    with SentenceStore(tmp_path / "store") as store:
        yield store


@torch.no_grad()
def continued(
    model: GPTHFForCausalLM, prompts: list[Tensor], source: StoredSentences | None, chunks: int = 1
) -> Tensor:
    """Logits after the prompts, read in so many chunks, and at each token of what all go on with."""
    cache, logits = model.new_cache(len(prompts)), []
    parts = [prompt.tensor_split(chunks) for prompt in prompts]
    for number in range(chunks):
        part = [pieces[number] for pieces in parts]
        row = torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(piece) for piece in part]))
        wanted = torch.zeros(len(row), dtype=torch.bool)
        wanted[torch.searchsorted(row, torch.arange(len(prompts)), right=True) - 1] = True
        found, _ = model.ragged_logits(torch.cat(part), row, cache, wanted=wanted, sentence_source=source)
        logits.append(found)
    for token in (7, 9, END, 5, 8):
        ids = torch.full((len(prompts),), token)
        found, _ = model.ragged_logits(ids, torch.arange(len(prompts)), cache, sentence_source=source)
        logits.append(found)
    return torch.cat(logits)


class EncoderTokens:
    """Counts what passes a model's encoder."""

    def __init__(self, model: GPTHFForCausalLM) -> None:
        self.count = 0
        encoder = model.model._stage_list()[0]
        encoder.register_forward_pre_hook(self._add)

    def _add(self, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.count += len(arguments[0])


def test_a_hit_equals_a_miss(storable, store):
    prompts = [random_text(60, seed=1), random_text(43, seed=2), torch.tensor([START]), random_text(31, seed=3)]
    prompts.append(torch.cat([prompts[0][:40], prompts[1][1:]]))  # one that shares sentences with others
    expected = continued(storable, prompts, None)
    source = store.of(storable)
    close(continued(storable, prompts, source), expected)
    missed = source.misses
    assert missed > 10
    counted = EncoderTokens(storable)
    close(continued(storable, prompts, source), expected)
    assert source.misses == missed, "all were found the second time"
    if not storable.config.recent_sentences:  # whose states reach back as many sentences a layer
        assert counted.count < sum(map(len, prompts)) / 2
    # Some known, some not.
    prompts[0] = torch.cat([random_text(20, seed=9), prompts[0][1:]])
    close(continued(storable, prompts, source), continued(storable, prompts, None))


@pytest.mark.parametrize("chunks", [2, 3, 7])
def test_in_chunks(storable, store, chunks):
    """A sentence across two chunks is read; whole ones are found, whatever the cache holds already."""
    prompts = [random_text(60, seed=1), random_text(44, seed=2)]
    expected = continued(storable, prompts, None, chunks)
    close(expected[-10:], continued(storable, prompts, None)[-10:])
    source = store.of(storable)
    for _ in range(2):
        close(continued(storable, prompts, source, chunks), expected)
    assert source.hits > 5


def test_last_logits_of_pieces(storable, store):
    """With whole sentences known, which skip the encoder, so that it may get one token of a piece, or none."""
    source = store.of(storable)
    continued(storable, [RESTLESS], source)
    check_last_logits_of_pieces(storable, source)
    assert source.hits > 20


def test_against_the_dense_mask(storable, store):
    prompts = [random_text(50, seed=4), random_text(33, seed=5)]
    source = store.of(storable)
    expected = continued(storable, prompts, source)
    storable.config._attn_implementation = "eager"
    close(continued(storable, prompts, source), expected)


def test_a_known_prompt_passes_no_encoder(store):
    """But for its open sentence, and sentences that the decoder still reads."""
    model = tiny_model("hourglass")
    ids = random_text(80, seed=6)
    ids[-4:] = torch.tensor([END, 5, 6, 7])
    continued(model, [ids], store.of(model))
    counted = EncoderTokens(model)
    with torch.no_grad():
        wanted = torch.arange(80) == 79
        row = torch.zeros(80, dtype=torch.long)
        model.ragged_logits(ids, row, model.new_cache(1), wanted=wanted, sentence_source=store.of(model))
    assert counted.count == 3


def test_where_all_logits_are_wanted_everything_is_read(store):
    model = tiny_model("hourglass")
    ids, source = random_text(50, seed=6), None
    for _ in range(2):
        source = store.of(model)
        with torch.no_grad():
            logits, _ = model.ragged_logits(ids, torch.zeros(50, dtype=torch.long), sentence_source=source)
        close(logits, full_logits(model, ids))
        # Only sentences without a token inside: each end that follows an end, and the start.
        is_end = (ids == END) | (ids == START)
        assert source.hits + source.misses == int((is_end & torch.cat([torch.ones(1).bool(), is_end[:-1]])).sum())


def test_uncommitted_tokens_are_read(store):
    """A draft that is partly taken back counts tokens in every stage."""
    model = tiny_model("hybrid")
    source = store.of(model)
    ids = random_text(40, seed=8)
    continued(model, [ids], source)
    results = []
    for given in (None, source):
        cache = model.new_cache(1)
        cache.autocommit = False
        with torch.no_grad():
            model.ragged_logits(ids, torch.zeros(40, dtype=torch.long), cache, sentence_source=given)
            cache.commit(torch.tensor([25]))
            logits, _ = model.ragged_logits(torch.tensor([5]), torch.tensor([0]), cache, sentence_source=given)
        results.append(logits)
    close(results[1], results[0])


def test_gradients_are_those_of_reading(store):
    model = tiny_model("fast")
    ids = random_text(30, seed=8)
    row, wanted = torch.zeros(30, dtype=torch.long), torch.arange(30) == 29
    continued(model, [ids], store.of(model))
    gradients = []
    for source in (None, store.of(model)):
        model.zero_grad()
        logits, _ = model.ragged_logits(ids, row, wanted=wanted, sentence_source=source)
        logits.sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    assert bool(gradients[0].any())
    close(gradients[1], gradients[0])


def test_nothing_stale(store):
    """Changed weights are another model, in the same process and without anybody saying so."""
    model = tiny_model("hourglass")
    prompts = [random_text(60, seed=1)]
    source = store.of(model)
    continued(model, prompts, source)
    before, misses = source.fingerprint, source.misses
    with torch.no_grad():
        model.model.stages[0].layers[0].attention_norm.weight[0] += 1e-12
    assert source.fingerprint != before
    close(continued(model, prompts, source), continued(model, prompts, None))
    assert source.misses == 2 * misses
    before = source.fingerprint
    model.model.embed_tokens.weight.data[::2] += 1e-12  # behind the back of torch's count of versions
    assert source.fingerprint != before
    model.load_state_dict(tiny_model("hourglass", seed=3).state_dict())
    close(continued(model, prompts, source), continued(model, prompts, None))
    assert source.misses == 3 * misses
    # What later stages do with a vector is no part of it.
    with torch.no_grad():
        model.model.stages[1].layers[0].attention_norm.weight.mul_(2)
    close(continued(model, prompts, source), continued(model, prompts, None))
    assert source.misses == 3 * misses
    # Another precision has vectors of its own.
    assert encoder_fingerprint(model.bfloat16()) != source.fingerprint or source.model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_are_kept_to_the_bit(store, dtype):
    model = tiny_model("hourglass", summaries_per_sentence=2).to(dtype)
    source = store.of(model)
    vectors = torch.randn(3, *source.shape).to(dtype)
    source.add([b"a", b"b", b"c"], vectors)
    found, kept = source.find([b"c", b"x", b"a", b"c"])
    assert found == [0, 2, 3]
    assert torch.equal(kept, vectors[[2, 0, 2]])
    assert kept.dtype == dtype
    assert (source.hits, source.misses) == (3, 1)


@pytest.mark.parametrize(
    "model",
    [
        {"visibility": "keep_last"},
        {"visibility": "causal", "num_encoder_layers": 0},
    ],
    ids=["keep_last", "gpt"],
)
def test_models_without_vectors_say_so(store, model):
    with pytest.raises(UnsupportedError, match="has no vectors of sentences that could be kept"):
        store.of(tiny_model(**model))


def test_two_models_and_a_second_opening(tmp_path):
    first, second = tiny_model("hourglass"), tiny_model("hourglass", seed=1)
    prompts = [random_text(60, seed=1)]
    with SentenceStore(tmp_path) as store:
        for model in (first, second):
            continued(model, prompts, store.of(model))
        assert store.verify() == 0
    with SentenceStore(tmp_path) as store, SentenceStore(tmp_path) as beside:
        for model in (first, second):
            source = beside.of(model)
            close(continued(model, prompts, source), continued(model, prompts, None))
            assert source.misses == 0
        stats = store.stats()
        assert stats.sentences == 2 * len({tuple(s) for s in sentences_of(prompts[0])})
        assert [held.dtype for held in stats.models] == ["torch.float64"] * 2
        assert all(held.vector_bytes == held.sentences * 16 * 8 for held in stats.models)
        assert stats.used_bytes <= stats.file_bytes
        # Only the second model's remain.
        assert store.prune(keep=[encoder_fingerprint(second)]) == stats.sentences // 2
        assert [held.fingerprint for held in beside.stats().models] == [encoder_fingerprint(second)]


def test_a_model_removed_by_another_process_keeps_its_own(tmp_path):
    """What is pruned under a running model comes back, and another that comes meanwhile finds nothing of it."""
    first, second = tiny_model("fast"), tiny_model("fast", seed=1)
    names, vectors = [b"a", b"b"], torch.randn(2, 1, 1, 16, dtype=torch.float64)
    with SentenceStore(tmp_path) as store, SentenceStore(tmp_path) as beside:
        source = store.of(first)
        source.add(names, vectors)
        beside.prune(keep=["nobody"])
        assert source.find(names)[0] == []
        other = beside.of(second)
        other.add(names[:1], -vectors[:1])
        source.add(names, vectors)
        assert torch.equal(source.find(names)[1], vectors)
        assert torch.equal(other.find(names)[1], -vectors[:1])
        assert store.stats().sentences == 3


def test_a_store_in_use_elsewhere_is_no_harm(tmp_path, caplog):
    """Where asked to be tolerant: sentences count as unknown, the log says so, and the text is the same."""
    model = tiny_model("hourglass")
    prompts = [random_text(60, seed=1)]
    with SentenceStore(tmp_path, busy_seconds=0.05) as store:
        writer = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        writer.execute("BEGIN EXCLUSIVE")
        source = store.of(model, is_strict=False)
        close(continued(model, prompts, source), continued(model, prompts, None))
        assert source.failures > 0
        assert "read anew" in caplog.text
        with pytest.raises(OutputError, match="locked"):
            store.of(model).add([b"a"], torch.zeros(1, *source.shape))
        writer.execute("ROLLBACK")
        writer.close()
        close(continued(model, prompts, source), continued(model, prompts, None))
        assert store.stats().sentences > 0


def sentences_of(ids: Tensor) -> list[list[int]]:
    sentences: list[list[int]] = [[]]
    for token in ids.tolist():
        sentences[-1].append(token)
        if token in (START, END):
            sentences.append([])
    return sentences[:-1]


def filled(store: SentenceStore, count: int, size: int = 64, start: int = 0) -> StoredSentences:
    """A store with so many sentences, named by numbers, of 16 * 8 bytes each or more."""
    source = store.of(tiny_model("fast", hidden_size=size))
    names = [str(number).encode() for number in range(start, start + count)]
    source.add(names, torch.randn(count, *source.shape, dtype=torch.float64))
    return source


def test_the_least_recently_used_go_first(tmp_path, monkeypatch):
    now = [1_000]
    monkeypatch.setattr("thoughtformer.stores.vectors._now", lambda: now[0])
    with SentenceStore(tmp_path, max_bytes=MIB) as store:
        source = filled(store, 800)
        now[0] += 1
        source.find([str(number).encode() for number in range(100)])  # used again: the last to go
        now[0] += 1
        for start in range(800, 4000, 400):
            filled(store, 400, start=start)
            assert store.stats().used_bytes <= MIB
            now[0] += 1
        assert source.find([b"3999"])[0] == [0]
        assert source.find([b"150", b"700"])[0] == []
        held = store.stats().sentences
        assert 800 < held < 2000
        file_bytes = store.file.stat().st_size
        assert file_bytes < 2 * MIB
        removed = store.prune(max_bytes=400_000)
        assert removed > 0
        assert store.stats().used_bytes <= 400_000
        assert store.file.stat().st_size <= 400_000 + 8192
        assert store.verify() == 0


def test_used_again_means_kept(tmp_path, monkeypatch):
    now = [1_000]
    monkeypatch.setattr("thoughtformer.stores.vectors._now", lambda: now[0])
    with SentenceStore(tmp_path) as store:
        source = filled(store, 1000)
        now[0] += 5
        often = [str(number).encode() for number in range(0, 1000, 10)]
        source.find(often)
        store.prune(max_bytes=300_000)
        assert len(source.find(often)[0]) == 100
        assert store.stats().sentences < 600


def test_damage_is_seen(tmp_path):
    model = tiny_model("hourglass")
    prompts = [random_text(60, seed=1)]
    with SentenceStore(tmp_path) as store:
        continued(model, prompts, store.of(model))
    connection = sqlite3.connect(tmp_path / FILE)
    connection.execute("UPDATE sentences SET vector = zeroblob(length(vector)) WHERE rowid % 2 = 0")
    connection.execute("UPDATE sentences SET vector = x'00' WHERE rowid = 1")
    connection.commit()
    damaged = connection.execute("SELECT count(*) FROM sentences WHERE rowid % 2 = 0 OR rowid = 1").fetchone()[0]
    connection.close()
    with SentenceStore(tmp_path) as store:
        assert store.verify() == damaged
        source = store.of(model)
        close(continued(model, prompts, source), continued(model, prompts, None))
        assert source.misses >= damaged
        assert store.verify() == 0, "what was damaged was read, and put right"
    content = bytearray((tmp_path / FILE).read_bytes())
    content[4096 : 4096 * 4] = random.Random(0).randbytes(4096 * 3)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(StoreError, match="damaged"), SentenceStore(tmp_path) as store:
        store.verify()


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / FILE).write_text("Dear diary, this is no database at all. " * 200)
    with pytest.raises(StoreError, match="no sentence store"):
        SentenceStore(tmp_path)
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE mine (a)")
    other.commit()
    other.close()
    (tmp_path / "other.sqlite").rename(tmp_path / FILE)
    with pytest.raises(StoreError, match=r"^[^(]*is no sentence store of format 2"):
        SentenceStore(tmp_path)
    with pytest.raises(ConfigError, match="max_bytes=5 is less"):
        SentenceStore(tmp_path / "new", max_bytes=5)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't make a sentence store"):
        SentenceStore(tmp_path / "file")
    store = SentenceStore(tmp_path / "closed")
    store.close()
    store.close()
    with pytest.raises(InputError, match="is closed"):
        store.stats()


def kills() -> int:
    return int(os.environ.get("THOUGHTFORMER_KILLS", "15"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_survives_being_killed_in_a_write(tmp_path):
    """A writer is killed again and again, among readers; what it had finished is there, and whole."""
    model = tiny_model("fast")
    with SentenceStore(tmp_path, max_bytes=4 * MIB) as reader:
        vectors = torch.randn(50, *reader.of(model).shape, dtype=torch.float64)
        finished = 0
        for attempt in range(kills()):
            told, tell = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    with SentenceStore(tmp_path, max_bytes=4 * MIB) as store:
                        source = store.of(model)
                        for batch in range(10_000):
                            source.add([f"{attempt}/{batch}/{number}".encode() for number in range(50)], vectors)
                            os.write(tell, b".")
                finally:
                    os._exit(0)
            os.close(tell)
            os.read(told, 1)
            time.sleep(random.Random(attempt).uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            batches = 1 + len(os.read(told, 1 << 16))
            os.close(told)
            names = [f"{attempt}/{batch}/{number}".encode() for batch in range(batches) for number in range(50)]
            found, kept = reader.of(model).find(names[-200:])
            assert len(found) == len(names[-200:])
            assert torch.equal(kept[-50:], vectors)
            assert reader.verify() == 0
            finished += batches
        assert finished > kills()
        assert reader.stats().used_bytes <= 4 * MIB


def test_processes_share_a_store(tmp_path):
    """Several write at once; each waits for its turn, and all is there."""
    model = tiny_model("fast")
    children = []
    with SentenceStore(tmp_path) as store:
        source = store.of(model)
        vectors = torch.randn(20, *source.shape, dtype=torch.float64)
        for writer in range(4):
            child = os.fork()
            if child == 0:
                failed = 1
                try:
                    for batch in range(25):  # the parent's store, opened anew on this side of the fork
                        source.add([f"{writer}/{batch}/{number}".encode() for number in range(20)], vectors)
                    failed = 0
                finally:
                    os._exit(failed)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        assert store.stats().sentences == 4 * 25 * 20
        assert store.verify() == 0


def test_padding_ids_are_ordinary_tokens(store):
    """Nothing but the two special tokens has a meaning."""
    model = tiny_model("hourglass")
    ids = torch.tensor([START, PAD, VOCAB - 1, END, 5])
    source = store.of(model)
    for _ in range(2):
        close(continued(model, [ids], source), continued(model, [ids], None))
    assert source.hits >= 2

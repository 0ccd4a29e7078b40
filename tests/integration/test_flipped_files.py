"""Every kind of file of ours with one bit flipped, anywhere: refused in our words, made anew, or the same content.

Never another content, and never somebody else's error. THOUGHTFORMER_FLIPS says how many flips a kind.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lms import TINY_METHODS, policy, tiny_adapter, tiny_compressed, tiny_lm
from prose import PAGE, tiny_pair, tiny_tokenizer
from thoughtformer import compress
from thoughtformer.cache import saving
from thoughtformer.cache.saving import saved_cache
from thoughtformer.compression import Context
from thoughtformer.engine import Scheduler, SentenceStore, Sessions
from thoughtformer.errors import CheckpointError, ThoughtformerError
from thoughtformer.files import seal, sealed_json
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.recipes import recipe
from thoughtformer.runners.opening import runner_of
from thoughtformer.sampling import SamplingParams
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.packing import TokenisedCorpus
from thoughtformer.train.folder import finished_result, prepare_output, same_data

FLIPS = int(os.environ.get("THOUGHTFORMER_FLIPS", "40"))


PARAMS = SamplingParams(max_new_tokens=8, ignore_end_of_text=True)


class Kind:
    """A folder that was written by the product, and how it is read again."""

    def __init__(self, folder: Path, read: Callable[[], Any], *, is_rebuilt: bool = False) -> None:
        self.folder = folder
        self.read = read
        self.is_rebuilt = is_rebuilt
        self.expected = read()

    def outcome(self, chooser: random.Random, kept: Path) -> str:
        """What comes of one flip; the folder is as before afterwards."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.stat().st_size)
        # As often in a small file as in a large one.
        file = chooser.choice(files)
        content = bytearray(file.read_bytes())
        at = chooser.randrange(len(content))
        content[at] ^= 1 << chooser.randrange(8)
        file.write_bytes(content)
        try:
            same = self.read() == self.expected
            made_anew = self.is_rebuilt and file.read_bytes() != bytes(content)
            return (
                "made anew" if made_anew and same else "the same content" if same else f"ANOTHER CONTENT: {file.name}"
            )
        except ThoughtformerError:
            return "refused"
        except Exception as error:
            return f"FOREIGN ERROR: {file.name} at {at}: {error!r}"
        finally:
            shutil.rmtree(self.folder)
            shutil.copytree(kept, self.folder)


def contexts(tmp_path: Path, name: str) -> Kind:
    model = tiny_lm("llama", vocab_size=400, max_position_embeddings=512)
    compressed = tiny_compressed(model, TINY_METHODS[name])
    ids = tiny_tokenizer(False)(PAGE[:300])["input_ids"]
    folder = tmp_path / "contexts"
    folder.mkdir()
    Context.read(compressed, ids).save(folder / "a.ctx")

    def read() -> Any:
        context = Context.load(compressed, folder / "a.ctx")
        return context.ids, {key: tensor.tolist() for key, tensor in context.cache.saved().items()}

    return Kind(folder, read)


def sessions(tmp_path: Path, **shape: Any) -> Kind:
    model, tokenizer = tiny_pair(**shape)
    folder = tmp_path / "sessions"
    runner = runner_of(model, tokenizer)
    written = Sessions(runner, folder=folder, max_bytes=1)
    session, row = written.begin("a", PAGE[:200], PARAMS)
    scheduler = Scheduler(runner)
    scheduler.enqueue([row])
    while scheduler.has_work:
        scheduler.round()
    written.finish(session, row)
    written.make_room()

    def read() -> Any:
        loaded, _ = Sessions(runner, folder=folder).begin("a", "x", PARAMS)
        assert loaded.cache is not None, "a file that is there is no new session"
        held = saved_cache(loaded.cache, loaded.ids)
        return loaded.num_read, {key: tensor.tolist() for key, tensor in held.items()}

    return Kind(folder, read)


def stores(tmp_path: Path) -> Kind:
    model, tokenizer = tiny_pair(body_visibility="fast")
    folder, ids = tmp_path / "store", torch.from_numpy(tokenizer.encode_document(PAGE, complete=True))
    sentences: list[bytes] = []
    with SentenceStore(folder) as store:
        source = store.of(model)
        add = source.add

        def noting(new: Any, vectors: torch.Tensor) -> None:
            sentences.extend(new)
            add(new, vectors)

        source.add = noting  # type: ignore[method-assign]
        model.model.remember_sentences(ids, source)
    with SentenceStore(folder) as store:
        found, vectors = store.of(model).find(sentences)
        whole = dict(zip(found, vectors.tolist(), strict=True))
    assert len(whole) == len(sentences) > 5

    def read() -> Any:
        """True where every vector that is found is the one that was stored; those that are missing are read anew."""
        with SentenceStore(folder) as store:
            found, vectors = store.of(model).find(sentences)
            store.stats(), store.verify()
        return all(whole[number] == vector for number, vector in zip(found, vectors.tolist(), strict=True))

    return Kind(folder, read)


def token_files(tmp_path: Path) -> Kind:
    (tmp_path / "a.txt").write_text(PAGE, encoding="utf-8")
    folder = tmp_path / "tokens"

    def read() -> Any:
        tokens = TokenisedCorpus.build(Corpus(sources=[tmp_path / "a.txt"]), tiny_tokenizer(), folder=folder)
        return tokens.digest, np.asarray(tokens.tokens).tolist(), tokens.starts.tolist(), tokens.num_bytes.tolist()

    return Kind(folder, read, is_rebuilt=True)


def adapters(tmp_path: Path) -> Kind:
    model, folder = tiny_lm(), tmp_path / "adapter"
    base = fingerprint(model)
    adapter = tiny_adapter(model)
    folder.mkdir()
    adapter.save(folder, fingerprint=base)
    adapter.remove()

    def read() -> Any:
        with compress(model, "sentinel", adapter=folder, policy=policy()) as compressed:
            return [part.tolist() for part in compressed.adapter.trainable()]

    return Kind(folder, read)


def checkpoints(tmp_path: Path) -> Kind:
    """A run's folder to resume from: recipe, data, and a checkpoint's files, here with what the Trainer writes."""
    out, chosen = tmp_path / "run", recipe("tiny-gpthf")
    prepare_output(out, chosen, resume=False, overwrite=False)
    (tmp_path / "a.txt").write_text(PAGE, encoding="utf-8")
    tokens = TokenisedCorpus.build(Corpus(sources=[tmp_path / "a.txt"]), tiny_tokenizer(), folder=tmp_path / "cache")
    same_data(out, tokens, resume=False, is_first=True)
    checkpoint = out / "checkpoint-3"
    model, _ = tiny_pair()
    model.float().save_pretrained(checkpoint)
    torch.save({"state": torch.ones(30)}, checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    seal(checkpoint)

    def read() -> Any:
        found = prepare_output(out, chosen, resume=True, overwrite=False)
        same_data(out, tokens, resume=True, is_first=True)
        assert found is not None
        return found, [file.read_bytes() for file in sorted(Path(found).iterdir()) if file.name != "digests.json"]

    return Kind(out, read)


def results(tmp_path: Path) -> Kind:
    """The manifest of a finished run."""
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "training.json").write_text(sealed_json({"steps": 3, "mean_loss": 2.5}))
    return Kind(folder, lambda: finished_result(folder))


KINDS: dict[str, Callable[[Path], Kind]] = {
    "contexts": lambda place: contexts(place, "sentinel"),
    "contexts of h2o": lambda place: contexts(place, "h2o"),
    "contexts of the combiner": lambda place: contexts(place, "combiner"),
    "contexts of tiers": lambda place: contexts(place, "quantised_tiers"),
    "contexts of pages": lambda place: contexts(place, "selection"),
    "contexts that were read twice": lambda place: contexts(place, "kvzip_4"),
    "sessions": lambda place: sessions(place, body_visibility="fast", num_decoder_layers=2, summaries_per_sentence=2),
    "sessions of a plain GPT": lambda place: sessions(place, plain=True),
    "stores": stores,
    "token files": token_files,
    "adapters": adapters,
    "checkpoints": checkpoints,
    "results": results,
}


@pytest.mark.parametrize("name", list(KINDS))
def test_a_flipped_bit_is_never_believed(name, tmp_path, record_property):
    kind = KINDS[name](tmp_path)
    kept = tmp_path / "kept"
    shutil.copytree(kind.folder, kept)
    chooser, counts = random.Random(name), Counter[str]()
    for _ in range(FLIPS):
        counts[kind.outcome(chooser, kept)] += 1
    record_property("counts", dict(counts))
    sys.stderr.write(f"{name}: {dict(counts)}\n")
    allowed = {"refused", "made anew", "the same content"}
    assert set(counts) <= allowed, counts
    assert counts["refused"] + counts["made anew"] > 0 or name == "stores"


@pytest.mark.parametrize("name", ["sentinel", "h2o", "streaming", "quantised_tiers"])
def test_a_context_that_contradicts_itself_is_refused_though_its_digest_is_right(name, tmp_path):
    model = tiny_lm("llama", vocab_size=400, max_position_embeddings=512)
    compressed = tiny_compressed(model, TINY_METHODS[name])
    ids = tiny_tokenizer(False)(PAGE[:300])["input_ids"]
    context, path = Context.read(compressed, ids), tmp_path / "a.ctx"
    context.save(path)
    manifest, tensors = saving._read(path, "context")
    changes: dict[str, dict[str, torch.Tensor]] = {
        "progress": {"progress.0": tensors["progress.0"] + torch.tensor([1, 0, 0])},
        "held": {"progress.0": tensors["progress.0"] + torch.tensor([0, 1, 0])},
        "another text": {"ids": torch.cat([tensors["ids"], tensors["ids"][:1]])},
        "ids": {"ids": tensors["ids"] + 400},
        "a tensor less": {"lengths": tensors["lengths"][:0]},
    }
    by_head = name in ("h2o", "quantised_tiers")
    entries = tensors["position.1" if by_head else "entries"].clone()
    entries[0, 0, 1] = entries[0, 0, 0]
    changes["two entries of one position"] = {"position.1" if by_head else "entries": entries}
    if name == "quantised_tiers":
        positions = tensors["tier.1.positions.0"].clone()
        positions[0, 0] += 1  # its last is the next block's first
        changes["two of one position in a tier"] = {"tier.1.positions.0": positions}
        changes["a block more"] = {"tier.0.num_blocks": tensors["tier.0.num_blocks"] + 1}
        changes["a tier of another type"] = {"tier.0.key_codes.0": tensors["tier.0.key_codes.0"].float()}
    if name == "h2o":
        everywhere = {}
        for layer in range(3):
            everywhere[f"position.{layer}"] = tensors[f"position.{layer}"].clone()
            everywhere[f"position.{layer}"][0, :, -1] = -1
        changes["an entry less in every head"] = everywhere
        fewer = tensors["position.1"].clone()
        fewer[0, 1, 3] = -1
        changes["a head with fewer entries"] = {"position.1": fewer}
    for changed in changes.values():
        saving.write_saved(path, "context", manifest, tensors | changed)
        with pytest.raises(CheckpointError, match="contradicts itself"):
            Context.load(compressed, path)
    saving.write_saved(path, "context", manifest, tensors)
    assert Context.load(compressed, path).ids == ids


def test_a_session_that_contradicts_itself_is_refused_though_its_digest_is_right(tmp_path):
    kind = sessions(tmp_path, body_visibility="hybrid")
    (path,) = kind.folder.iterdir()
    manifest, tensors = saving._read(path, "session")
    entries = tensors["body.entries"].clone()
    entries[3, 0, 0] += 1
    for changed in (
        {"counters.position": tensors["counters.position"] + 1},
        {"num_tokens": tensors["num_tokens"] + 1},
        {"body.entries": entries},
        {"ids": tensors["ids"].flip(0)},
    ):
        saving.write_saved(path, "session", manifest, tensors | changed)
        with pytest.raises(CheckpointError, match="contradicts itself"):
            kind.read()
    saving.write_saved(path, "session", manifest | {"num_read": len(tensors["ids"]) + 1}, tensors)
    with pytest.raises(CheckpointError, match="contradicts itself"):
        kind.read()
    saving.write_saved(path, "session", manifest, tensors)
    assert kind.read() == kind.expected

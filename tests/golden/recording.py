"""What the product answered when these records were made: requests, bits, bytes held, and a file of each kind.

Everything is computed in float64, with weights that are the same on every processor, so that no kernel decides a
record. `python tests/golden/recording.py` makes them anew: a change of behaviour, which CHANGELOG.md must tell.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lms import compressed_pair, policy, tiny_adapter
from prose import prose, tiny_pair, tiny_tokenizer
from thoughtformer import compress, load
from thoughtformer.compression import (
    AdapterConfig,
    Combiner,
    Context,
    Full,
    HeavyHitters,
    Local,
    RandomEviction,
    Scattered,
    Sentinel,
    StreamingLLM,
)
from thoughtformer.engine import Engine, Scheduler, SentenceStore, Sessions, runner_of
from thoughtformer.evaluate.bits import document_bits
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.sampling import SamplingParams
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.packing import TokenisedCorpus

HERE = Path(__file__).parent
RECORDS, FILES = HERE / "records.json", HERE / "files"

TEXTS = [
    "The ferry was late. Nobody on the quay said a word.",
    'She laughed. "You never liked the sea," he said. "Why did you come?" It was cold, and the lamps were lit.',
    "One. Two. Three. Four words are here. And then",
    "a line without any end at all, of no sentence, which goes on and on until it is over",
    "Mr. Hale paid 3.50 for it, i.e. too much.\n\nThe second paragraph is short. It",
]
NEW_TOKENS = 12

_HOURGLASS = {"body_visibility": "fast", "num_decoder_layers": 2}
#: GPTHFs and the plain GPT, by the changes to a tiny one.
GPTHFS: dict[str, dict[str, Any]] = {
    "fast": {"body_visibility": "fast"},
    "keep_last": {"body_visibility": "keep_last"},
    "hybrid": {"body_visibility": "hybrid"},
    "causal": {"body_visibility": "causal"},
    "hybrid, recent sentences": {"body_visibility": "hybrid", "recent_sentences": 2},
    "hourglass": _HOURGLASS,
    "hourglass, recent sentences": _HOURGLASS | {"recent_sentences": 2, "num_key_value_heads": 2},
    "hourglass, summaries": _HOURGLASS | {"summaries_per_sentence": 2, "body_positions": "sentence"},
    "hourglass, depths": _HOURGLASS
    | {"num_encoder_layers": 2, "body_reads_depths": True, "decoder_reads_depths": True, "body_hidden_size": 16},
    "plain": {"plain": True},
}
#: Compressed models, by family and method.
COMPRESSED: dict[str, tuple[str, Any]] = {
    "full": ("plain", Full()),
    "local": ("gpt_neox", Local(removed=0.6)),
    "scattered": ("phi", Scattered(removed=0.6)),
    "streaming": ("llama", StreamingLLM(max_entries=20, first_tokens=3)),
    "random": ("qwen2", RandomEviction(max_entries=20, first_tokens=2, recent_tokens=4)),
    "combiner": ("qwen3", Combiner(policy=policy())),
    "sentinel": ("plain", Sentinel(policy=policy())),
    "sentinel, learned positions": ("gpt2", Sentinel(policy=policy(span_tokens=9), num_sentinels=2)),
    "sentinel, earlier ones seen": ("opt", Sentinel(policy=policy(), num_sentinels=2, see_earlier=True)),
    "h2o": ("mistral", HeavyHitters(max_entries=20)),
}


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights by exact arithmetic alone; those of one dimension stay as they are made."""
    chooser = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                drawn = chooser.random(tuple(parameter.shape)) - 0.5
                parameter.copy_(torch.from_numpy(drawn) * (1.0 if parameter.shape[0] > 1 else 2.0))


@cache
def gpthf(name: str) -> tuple[Any, Any]:
    """One of `GPTHFS`, and its tokenizer."""
    model, tokenizer = tiny_pair(**GPTHFS[name])
    fill(model)
    return model, tokenizer


@cache
def compressed(name: str) -> tuple[Any, Any]:
    """One of `COMPRESSED`, and its tokenizer."""
    model, tokenizer = compressed_pair(*COMPRESSED[name])
    fill(model.model)
    if model.adapter is not None:
        fill(model.adapter, seed=1)
    return model, tokenizer


def _params(seed: int | None) -> SamplingParams:
    sampled = {} if seed is None else {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": seed}
    return SamplingParams(max_new_tokens=NEW_TOKENS, ignore_end_of_text=True, **sampled)


def requests(pair: tuple[Any, Any], **settings: Any) -> list[dict[str, Any]]:
    """Ten requests, greedy and sampled, in batches: the ids they write, and the bytes they then hold."""
    engine = Engine(*pair, max_rows=3, **settings)
    done = []
    for seed in (None, 7):
        for completion in engine.generate(TEXTS, _params(seed)):
            done.append({"ids": completion.ids, "bytes": completion.cache_bytes})
    return done


def requests_of_h2o(pair: tuple[Any, Any]) -> list[dict[str, Any]]:
    """The same by `generate`, one by one: when these were recorded, rows of H2O didn't share a batch."""
    model, tokenizer = pair
    done = []
    for seed in (None, 7):
        for text in TEXTS:
            ids = torch.tensor([tokenizer.encode(text)])
            torch.manual_seed(0 if seed is None else seed)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=seed is not None,
                return_dict_in_generate=True,
            )
            written = output.sequences[0, ids.shape[1] :].tolist()
            done.append({"ids": written, "bytes": output.cache.num_bytes()})
    return done


def turns(pair: tuple[Any, Any], folder: Path | None = None) -> list[dict[str, Any]]:
    """Three turns of a session; with a folder, it leaves memory after each."""
    runner = runner_of(*pair)
    sessions = Sessions(runner, folder=folder, max_bytes=1 if folder else 1 << 30)
    done = []
    for text in TEXTS[:3]:
        session, row = sessions.begin("golden", text, _params(None))
        scheduler = Scheduler(runner)
        scheduler.enqueue([row])
        while scheduler.has_work:
            scheduler.round()
        sessions.finish(session, row)
        held = session.num_bytes()
        sessions.make_room()
        done.append({"ids": row.ids[row.num_prompt_tokens :], "bytes": held})
    return done


def bits(pair: tuple[Any, Any]) -> list[float]:
    """Bits of three texts, in windows that overlap."""
    return [
        float(document_bits(*pair, prose(900, seed=seed), context_tokens=96, stride_tokens=48).bits.sum())
        for seed in range(3)
    ]


def records() -> dict[str, dict[str, Callable[[], Any]]]:
    """How each record is made, by what it is of."""
    made: dict[str, dict[str, Callable[[], Any]]] = {"requests": {}, "turns": {}, "bits": {}}
    for name in GPTHFS:
        made["requests"][name] = lambda name=name: requests(gpthf(name))
        made["turns"][name] = lambda name=name: turns(gpthf(name))
        made["bits"][name] = lambda name=name: bits(gpthf(name))
    for name in COMPRESSED:
        run = requests_of_h2o if name == "h2o" else requests
        made["requests"][name] = lambda name=name, run=run: run(compressed(name))
        if name != "h2o":
            made["turns"][name] = lambda name=name: turns(compressed(name))
    return made


# Files. Their models are read from files, too, so that fingerprints hold.


def read_model() -> tuple[Any, Any]:
    """The hourglass of the model's folder."""
    return load(FILES / "model", dtype=torch.float64)


def read_plain() -> tuple[Any, Any]:
    """The plain GPT of its folder."""
    return load(FILES / "plain", dtype=torch.float64)


def folding(model: Any) -> Any:
    """The plain GPT under the adapter of the adapter's folder."""
    return compress(model, "sentinel", adapter=FILES / "adapter", policy=policy())


def write_files() -> None:
    """One of each kind that the product writes."""
    shutil.rmtree(FILES, ignore_errors=True)
    for name, folder in (("hourglass", "model"), ("plain", "plain")):
        model, tokenizer = gpthf(name)
        model.save_pretrained(FILES / folder)
        tokenizer.save_pretrained(FILES / folder)
    plain, tokenizer = read_plain()
    adapter = tiny_adapter(plain, lora_rank=AdapterConfig().lora_rank and 2)
    fill(adapter, seed=1)
    (FILES / "adapter").mkdir()
    adapter.save(FILES / "adapter", fingerprint=fingerprint(plain))
    adapter.remove()
    with folding(plain) as view:
        Context.read(view, tokenizer.encode(TEXTS[1])).save(FILES / "a.ctx")
    pair = read_model()
    turns(pair, FILES / "sessions")
    with SentenceStore(FILES / "store") as store:
        requests(pair, store=store)
    (FILES / "text.txt").write_text(prose(2000), encoding="utf-8")
    token_files(FILES / "cache")


def token_files(folder: Path) -> TokenisedCorpus:
    """Of the text beside the files."""
    corpus = Corpus(sources=[FILES / "text.txt"])
    return TokenisedCorpus.build(corpus, tiny_tokenizer(), folder=folder, num_processes=1)


# What comes of the files. What reads may write (a store notes uses), so it reads copies.


def of_model() -> Any:
    """Requests to the saved hourglass."""
    return requests(read_model())


def of_adapter() -> Any:
    """Requests to the saved plain GPT, folded by the saved adapter."""
    model, tokenizer = read_plain()
    with folding(model) as view:
        return requests((view, tokenizer))


def of_context() -> Any:
    """An answer to a saved context, and the bytes that it holds."""
    model, tokenizer = read_plain()
    with folding(model) as view:
        context = Context.load(view, FILES / "a.ctx")
        question = torch.tensor([tokenizer.encode(TEXTS[0], add_special_tokens=False)])
        return context.generate(question, max_new_tokens=NEW_TOKENS)[0].tolist(), context.num_bytes()


def of_session() -> Any:
    """Further turns of a saved session."""
    with tempfile.TemporaryDirectory() as place:
        copied = shutil.copytree(FILES / "sessions", Path(place, "sessions"))
        return turns(read_model(), copied)


def of_store() -> Any:
    """Requests to the saved hourglass, by vectors from the saved store; how many of its sentences it knew, and not."""
    with (
        tempfile.TemporaryDirectory() as place,
        SentenceStore(shutil.copytree(FILES / "store", Path(place, "store"))) as store,
    ):
        engine = Engine(*read_model(), max_rows=3, store=store)
        done = [completion.ids for completion in engine.generate(TEXTS, _params(None))]
        source = engine.runner.sentences
        assert source is not None
        return done, source.hits, source.misses


def of_token_files() -> Any:
    """The digest of saved token files, which are those that the text beside them gives today."""
    (folder,) = (FILES / "cache" / "tokens").iterdir()
    with tempfile.TemporaryDirectory() as place:
        assert np.array_equal(TokenisedCorpus(folder).tokens, token_files(Path(place)).tokens)
    return TokenisedCorpus(folder).digest


OF_FILES: dict[str, Callable[[], Any]] = {
    "model": of_model,
    "adapter": of_adapter,
    "context": of_context,
    "session": of_session,
    "store": of_store,
    "token files": of_token_files,
}


def main() -> None:
    """Makes everything anew."""
    write_files()
    made = {
        kind: {name: make() for name, make in several.items()}
        for kind, several in (records() | {"files": OF_FILES}).items()
    }
    lines = [
        json.dumps(kind)
        + ": {\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in several.items())
        for kind, several in made.items()
    ]
    RECORDS.write_text("{" + "},\n".join(lines) + "}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

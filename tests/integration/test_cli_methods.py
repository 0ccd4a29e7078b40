"""Any method on any causal LM, by the command line: written with by the one loop, as the library does it."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

import thoughtformer
from lms import tiny_lm
from prose import PAGE, tiny_pair
from thoughtformer.compression import METHODS
from thoughtformer.engine import Limits, Scheduler, runner_of

SETTINGS: dict[str, tuple[str, ...]] = {
    "full": (),
    "streaming": ("--max-entries", "40", "--set", "first_tokens=2"),
    "h2o": ("--max-entries", "40", "--set", "recent_fraction=0.25"),
    "tova": ("--max-entries", "40"),
    "snapkv": ("--max-entries", "40", "--set", "every_tokens=16", "--set", "observed_tokens=8"),
    "expected_attention": ("--max-entries", "40", "--set", "every_tokens=16", "--set", "covariance=full"),
    "sepllm": ("--set", "recent_tokens=20"),
    "selection": ("--set", "read_tokens=32", "--set", "recent_tokens=8"),
    "lookup": ("--set", "read_tokens=32", "--set", "recent_tokens=8"),
    "attention_matching": ("--removed", "0.5", "--set", "chunk_tokens=32", "--set", "recent_tokens=8"),
    "kvzip": ("--removed", "0.5", "--set", "chunk_tokens=32", "--set", "recent_tokens=8"),
    "quantised": ("--set", "bits=4", "--set", "recent_tokens=8", "--set", "held_tokens=64"),
    "truncation": ("--set", "piece_tokens=40"),
    "random": ("--max-entries", "40"),
    "combiner": ("--removed", "0.5", "--span-tokens", "4"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    place = tmp_path_factory.mktemp("methods") / "llama"
    backend = tiny_pair()[1].backend_tokenizer
    tiny_lm("llama", vocab_size=len(tiny_pair()[1]), max_position_embeddings=512).float().save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(place)
    return place


def answer(run, *arguments: object) -> dict:
    code, out, err = run("generate", "--json", "--ignore-eos", "--max-new-tokens", 12, *arguments)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"sentinel"}))
def test_every_method_writes_as_the_library_does(run, llama, method):
    told = answer(
        run, "--model", llama, "--method", method, *SETTINGS.get(method, ("--removed", "0.5")), "--prompt", PAGE[:300]
    )
    model, tokenizer = thoughtformer.load(llama)
    settings = {
        "full": {},
        "streaming": {"max_entries": 40, "first_tokens": 2},
        "h2o": {"max_entries": 40, "recent_fraction": 0.25},
        "tova": {"max_entries": 40},
        "snapkv": {"max_entries": 40, "every_tokens": 16, "observed_tokens": 8},
        "expected_attention": {"max_entries": 40, "every_tokens": 16, "covariance": "full"},
        "sepllm": {"recent_tokens": 20, "tokenizer": tokenizer},
        "selection": {"read_tokens": 32, "recent_tokens": 8},
        "lookup": {"read_tokens": 32, "recent_tokens": 8},
        "attention_matching": {"removed": 0.5, "chunk_tokens": 32, "recent_tokens": 8},
        "kvzip": {"removed": 0.5, "chunk_tokens": 32, "recent_tokens": 8},
        "quantised": {"bits": 4, "recent_tokens": 8, "held_tokens": 64},
        "truncation": {"piece_tokens": 40},
        "random": {"max_entries": 40},
        "combiner": {"removed": 0.5, "span_tokens": 4},
    }.get(method, {"removed": 0.5})
    with thoughtformer.compress(model, method, **settings) as compressed:
        ids = tokenizer(PAGE[:300], return_tensors="pt").input_ids
        expected = compressed.generate(ids, max_new_tokens=12, do_sample=False)
    assert told["ids"] == expected[0, ids.shape[1] :].tolist()
    assert told["finish_reason"] == "length"
    assert told["usage"]["prompt_tokens"] == ids.shape[1]
    assert told["bytes"]["kv_cache"] > 0
    if method not in ("full", "selection", "lookup"):
        assert told["entries"] < ids.shape[1]


def test_a_model_of_transformers_as_it_is(run, llama):
    told = answer(run, "--model", llama, "--prompt", "The ferry")
    model, tokenizer = thoughtformer.load(llama)
    ids = tokenizer("The ferry", return_tensors="pt").input_ids
    assert told["ids"] == model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()


def test_a_context_of_any_method(run, llama, tmp_path):
    (tmp_path / "page.txt").write_text(PAGE[:400], encoding="utf-8")
    where, method = ("--model", llama), ("--method", "streaming", "--max-entries", "40")
    read = ("compress", "context", *where, "--file", tmp_path / "page.txt", "--out", tmp_path / "page.ctx", "--json")
    code, out, err = run(*read, *method)
    assert code == 0, err
    assert json.loads(out)["entries"] < 40
    told = answer(run, *where, "--context", tmp_path / "page.ctx", "--prompt", " The ferry")
    code, _, err = run(
        "generate", *where, "--context", tmp_path / "page.ctx", "-p", "a", "--adapter", "tiny-gpt-sentinel"
    )
    assert code == 2 and "takes no adapter" in err
    assert told["usage"]["cached_prompt_tokens"] == 0
    whole = answer(run, *where, *method, "--prompt", PAGE[:400] + " The ferry")
    assert told["usage"]["context_tokens"] == json.loads(out)["tokens"]
    assert told["ids"] == whole["ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "knorm"], "nearest to kvpress's knorm"),
        (["--method", "streaming", "--set", "first_token=3"], "Did you mean 'first_tokens'"),
        (["--method", "streaming", "--set", "first_tokens"], "write name=value"),
        (["--method", "streaming", "--removed", "0.5"], "streaming holds a number of entries"),
        (["--method", "local", "--max-entries", "9"], "local has no setting 'max_entries'"),
        (["--method", "local", "--sentences"], "local drops tokens"),
        (["--method", "streaming", "--max-entries", "9", "--set", "max_entries=8"], "that is --max-entries's"),
        (["--method", "combiner", "--set", "removed=0.5"], "that is --removed's"),
        (["--method", "combiner", "--set", "policy=nonsense"], "that is --removed, --sentences or --max-bytes's"),
        (["--method", "combiner", "--set", "recent_token=3"], "combiner has no setting 'recent_token'"),
        (["--method", "local", "--adapter", "tiny-gpt-sentinel"], "takes no adapter"),
        (["--method", "sentinel"], "give the sentinels' --adapter"),
        (["--max-entries", "9"], "--max-entries says how an --adapter folds, or what a --method drops: name one"),
        (["--method", "local", "--store", "store"], "compress other models"),
    ],
)
def test_mistakes_are_named(run, llama, arguments, message):
    code, _, err = run("generate", "--model", llama, "--prompt", "a", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_gpthf_keeps_its_own_way(run):
    code, _, err = run("generate", "--prompt", "a", "--method", "local", "--removed", "0.5")
    assert code == 2
    assert "folds its sentences itself" in err


@pytest.mark.parametrize("max_entries", [31, 32, 33, 64, 65])
def test_heavy_hitters_stay_within_their_bound(llama, max_entries):
    model, tokenizer = thoughtformer.load(llama)
    with thoughtformer.compress(model, "h2o", max_entries=max_entries) as compressed:
        scheduler = Scheduler(runner_of(compressed, tokenizer), Limits(max_rows=1))
        request = scheduler.submit(PAGE[:250])
        while scheduler.has_work:
            scheduler.round()
            held = scheduler.batch.num_bytes()
            assert held <= scheduler.admission.most_bytes([request])
            assert held or not scheduler.batch.requests


def test_settings_of_a_policy(run, llama):
    where = ("--model", llama, "--method", "combiner", "--removed", "0.9", "--prompt", PAGE[:200])
    few, many = (answer(run, *where, "--set", f"recent_tokens={count}")["entries"] for count in (4, 30))
    assert few < 30 <= many


def test_a_refused_store_is_not_made(run, tmp_path):
    code, _, err = run("generate", "--model", "tiny-gpt", "--prompt", "a", "--store", tmp_path / "store")
    assert code == 2 and "causal" in err
    assert not (tmp_path / "store").exists()


def test_bytes_of_what_is_quantised(run, llama):
    """A budget of bytes, by its own option."""
    asked = ("--model", llama, "--method", "quantised", "--set", "recent_tokens=8", "--set", "block_tokens=8")
    whole = answer(run, "--model", llama, "--prompt", PAGE[:400])["bytes"]["kv_cache"]
    told = answer(run, *asked, "--max-bytes", whole // 5, "--prompt", PAGE[:400])
    assert whole / 7 < told["bytes"]["kv_cache"] <= whole / 5
    code, _, err = run("generate", *asked, "--max-bytes", 1000, "--prompt", "a")
    assert code == 2
    assert "max_bytes=1000 is too little" in " ".join(err.split())


def test_tasks(run, llama):
    ask = ("compress", "eval", "--model", llama, "--context-tokens", 400, "--num-blocks", 2, "--seeds", "0,1")
    asked = ("--methods", "full,streaming,quantised", "--removed", "0.5", "--tasks", "planted_fact,read_again")
    code, out, err = run(*ask, *asked, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [(line["task"], line["method"]) for line in told["summary"]] == [
        (task, method) for task in ("planted_fact", "read_again") for method in ("full", "streaming")
    ]
    assert all(line["num_texts"] == 4 for line in told["summary"])
    assert told["summary"][0]["above_full_nats"] == 0 != told["summary"][1]["above_full_nats"]
    assert [skip["method"] for skip in told["skipped"]] == ["quantised"]
    assert "quantised at 50% is left out: quantised can't be set" in err
    code, out, err = run(*ask, *asked)
    assert code == 0, err
    assert "planted_fact" in out
    for arguments, message in (
        ((), "give --data, or --tasks"),
        (("--tasks", "all", "--data", "x.txt"), "give --data, or --tasks"),
        (("--tasks", "plantd_fact"), "Did you mean 'planted_fact'"),
    ):
        code, _, err = run(*ask, *arguments)
        assert code == 2
        assert message in " ".join(err.split())

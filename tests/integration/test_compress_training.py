"""Training sentinels: what is scored, what is learned, resumed exactly; and the commands around it, as typed."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import thoughtformer.train.compress as module
from lms import policy, random_ids, tiny_adapter, tiny_compressed, tiny_lm
from prose import PAGE, prose, tiny_pair, tiny_tokenizer
from thoughtformer.compression import METHODS, AdapterConfig, Sentinel, compress
from thoughtformer.compression.at_once import AttendAtOnce
from thoughtformer.errors import CheckpointError, ConfigError, ContextOverflowError, CorpusError, OutputError
from thoughtformer.models.backbone import backbone_of
from thoughtformer.models.loading import load
from thoughtformer.rules.schedule import RowReading
from thoughtformer.train.adapter_rows import AdapterRecipe, FoldingCollator
from thoughtformer.train.compress import AdapterTraining, train_adapter
from thoughtformer.train.spans import FoldingSettings, fold_row

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore:.*lr_scheduler.step.*", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a plain model, a Llama of transformers with a tokenizer of its own, and text."""
    folder = tmp_path_factory.mktemp("compress")
    model, tokenizer = tiny_pair(plain=True)
    model.float().save_pretrained(folder / "gpt")
    tokenizer.save_pretrained(folder / "gpt")
    backend = tiny_tokenizer(False).backend_tokenizer
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=300, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    fast.save_pretrained(folder / "llama")
    texts = (prose(6000, seed=seed) for seed in range(4))
    (folder / "data.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    (folder / "page.txt").write_text(PAGE[:220], encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _cache(place, monkeypatch):
    monkeypatch.setenv("THOUGHTFORMER_CACHE", str(place / "cache"))


def small(**changes: object) -> AdapterRecipe:
    settings: dict[str, object] = {
        "adapter": AdapterConfig(lora_rank=2),
        "folding": FoldingSettings(max_lag_tokens=16),
        "row_tokens": 96,
        "min_row_tokens": 16,
        "rows_per_step": 4,
        "rows_per_batch": 2,
        "max_steps": 6,
        "precision": "fp32",
        "save_every_steps": 3,
        "log_every_steps": 2,
    }
    return AdapterRecipe(**(settings | changes))


def batch_of(recipe, model, rows):
    collator = FoldingCollator(recipe, backbone_of(model).vocab_size, lambda: 0.0)
    return collator([{"ids": row, "index": number} for number, row in enumerate(rows)])


def training_of(model, recipe, **adapter):
    adapter = {"num_sentinels": recipe.adapter.num_sentinels, "see_earlier": recipe.adapter.see_earlier} | adapter
    method = Sentinel(num_sentinels=adapter["num_sentinels"], see_earlier=adapter["see_earlier"])
    return AdapterTraining(compress(model, method, adapter=tiny_adapter(model, **adapter)), recipe.teacher_weight)


@torch.no_grad()
def folded_logits(compressed, recipe, rows):
    """Each row's logits by itself, under just the folding that the collator drew for it."""
    for number, row in enumerate(rows):
        folded = fold_row(row, recipe.folding, 1, np.random.default_rng([recipe.seed, 0, number]))
        events = {event.at: [] for event in folded.reading.events}
        for event in folded.reading.events:
            events[event.at].append(event)

        class Fixed(Sentinel):
            """Folds what the collator folded."""

            def after(self, state, token_id, events=events):
                return events.get(state.num_tokens - 1, [])

        single = compress(compressed.model, Fixed(), adapter=compressed.adapter)
        yield single(torch.tensor([row]), use_cache=False).logits[0]


@pytest.mark.parametrize("family", ["plain", "llama", "gpt2"])
def test_every_real_token_is_scored_once_and_sentinels_never(family):
    """The batch's loss is that of each row read through the schedule alone, over real tokens, adjacent spans or not."""
    model = tiny_lm(family)
    recipe = small(folding=FoldingSettings(min_removed=0.5, max_span_tokens=8, max_lag_tokens=4))
    rows = [ids.tolist() for ids in random_ids(3, 90)]
    rows[1] = rows[1][:60]
    batch = batch_of(recipe, model, rows)
    real = [[label for label in labels.tolist() if label != -100] for labels in batch["labels"]]
    assert real == [row[1:] for row in rows]
    assert not (batch["labels"] >= backbone_of(model).vocab_size).any()
    assert (batch["input_ids"] >= backbone_of(model).vocab_size).any()

    training = training_of(model, recipe)
    loss = training(**batch).loss
    expected, count = 0.0, 0
    for row, logits in zip(rows, folded_logits(training.compressed, recipe, rows)):
        expected += F.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum").item()
        count += len(row) - 1
    assert loss.item() == pytest.approx(expected / count, abs=1e-6)


def test_only_the_adapter_learns():
    model = tiny_lm()
    recipe = small()
    training = training_of(model, recipe)
    training(**batch_of(recipe, model, [ids.tolist() for ids in random_ids(2, 90)])).loss.backward()
    adapter = {id(parameter) for parameter in training.adapter_parameters}
    for name, parameter in training.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in adapter), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


def with_execution(attend, kind, *args, **settings):
    return attend(*args, **(settings | {"execution": kind}))


def test_gathered_gradients_equal_dense(monkeypatch):
    """Training's fast attention and the dense mask give the same gradients."""
    gradients = []
    for execution in ("gathered", "dense"):
        model = tiny_lm()
        recipe = small(folding=FoldingSettings(min_removed=0.5))
        training = training_of(model, recipe)
        with monkeypatch.context() as patch:
            patch.setattr(module, "AttendAtOnce", partial(with_execution, AttendAtOnce, execution))
            training(**batch_of(recipe, model, [ids.tolist() for ids in random_ids(2, 90)])).loss.backward()
        gradients.append([parameter.grad for parameter in training.adapter_parameters])
    for fast, slow in zip(*gradients):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["plain", "llama"])
def test_the_teacher_is_the_base_model(family):
    """All weight on the teacher: the divergence from the base's own predictions, none where nothing differs."""
    model = tiny_lm(family)
    recipe = small(teacher_weight=1.0)
    rows = [ids.tolist() for ids in random_ids(2, 90)]
    training = training_of(model, recipe)
    batch = batch_of(recipe, model, rows)
    loss = training(**batch).loss.item()
    training.compressed.close()
    with torch.no_grad():
        targets = model(torch.tensor(rows)).logits[:, :-1].log_softmax(-1)
    again = training_of(model, recipe)
    divergences = [
        F.kl_div(logits[:-1].log_softmax(-1), target, reduction="sum", log_target=True)
        for logits, target in zip(folded_logits(again.compressed, recipe, rows), targets)
    ]
    assert loss == pytest.approx(float(sum(divergences)) / (2 * 89), rel=1e-5)
    assert loss > 0.01
    same = small(teacher_weight=1.0, folding=FoldingSettings(max_removed=0.0, every_fraction=0.0))
    nothing = training_of(tiny_lm(family), same, lora_rank=0)
    assert nothing(**batch_of(same, model, rows)).loss.item() == pytest.approx(0.0, abs=1e-6)


def test_learns_resumes_and_loads(place):
    """A run that stops half way and goes on writes what an uninterrupted one writes; the loss falls."""
    recipe = small(max_steps=12, save_every_steps=6, learning_rate=2e-2, rows_learning_rate=2e-2)
    whole = train_adapter(recipe, place / "llama", [place / "data.txt"], place / "whole")
    shutil.copytree(place / "whole", place / "half")
    shutil.rmtree(place / "half" / "checkpoint-12")
    for file in ("training.json", "sentinel.safetensors", "adapter_model.safetensors"):
        (place / "half" / file).unlink()  # not finished yet
    train_adapter(recipe, place / "llama", [place / "data.txt"], place / "half", resume=True)
    for file in ("sentinel.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(place / name / file) for name in ("whole", "half"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file
    assert train_adapter(recipe, place / "llama", [place / "data.txt"], place / "whole", resume=True) == whole
    result = json.loads((place / "whole" / "training.json").read_text())
    assert result["last_loss"] < result["mean_loss"]
    assert result["nominal_removed"] == pytest.approx(whole.nominal_removed)
    assert 0 < result["achieved_removed"] < 1 and 0 < result["average_removed"] < 1
    assert "base_model_name_or_path" in (place / "whole" / "adapter_config.json").read_text()
    assert str(place) not in (place / "whole" / "adapter_config.json").read_text()

    model, _ = load(place / "llama")
    ids = random_ids(1, 90)
    with torch.no_grad(), compress(model, "sentinel", adapter=place / "whole", policy=policy()) as compressed:
        cache = compressed.new_cache(1)
        logits = compressed(ids, cache=cache).logits
    assert int(cache.num_entries[0]) < 90 and bool(logits.isfinite().all())


def test_what_can_not_be_trained_is_refused(place):
    data = [place / "data.txt"]
    with pytest.raises(ContextOverflowError, match="trained for 300"):
        train_adapter(small(row_tokens=400), place / "llama", data, place / "no1")
    (place / "short.txt").write_text("Too short.", encoding="utf-8")
    with pytest.raises(CorpusError, match="rows"):
        train_adapter(small(), place / "llama", [place / "short.txt"], place / "no2")
    with pytest.raises(ConfigError, match="teacher_weight"):
        small(teacher_weight=2.0)
    with pytest.raises(ConfigError, match=r"adapter\.lora_rnk"):
        AdapterRecipe.from_dict({"adapter": {"lora_rnk": 3}})
    assert not (place / "no1").exists()
    (place / "used").mkdir()
    (place / "used" / "file").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        train_adapter(small(), place / "llama", data, place / "used")


def test_foreign_and_damaged_adapters_are_refused(place, tmp_path):
    model = tiny_lm()
    from thoughtformer.models.fingerprint import fingerprint

    base = fingerprint(model)
    adapter = tiny_adapter(model)
    adapter.save(tmp_path, fingerprint=base)
    adapter.remove()
    with pytest.raises(CheckpointError, match="trained for a model with fingerprint"):
        compress(tiny_lm("qwen2"), "sentinel", adapter=tmp_path)
    names = [name for name, _ in model.named_parameters()]
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="isn't what it was"):
        compress(model, "sentinel", adapter=tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="num_sentinels=1"):
        compress(model, "sentinel", adapter=tmp_path, num_sentinels=2)
    (tmp_path / "sentinel.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has version None"):
        compress(model, "sentinel", adapter=tmp_path)
    assert [name for name, _ in model.named_parameters()] == names, "a refused adapter leaves nothing behind"
    with pytest.raises(CheckpointError, match="Did you mean 'tiny-gpt-sentinel'"):
        compress(model, "sentinel", adapter="tiny-gpt-sentinels")


def test_a_second_lora_is_refused():
    model = tiny_lm()
    first = tiny_compressed(model, Sentinel())
    with pytest.raises(Exception, match="LoRA already"):
        tiny_compressed(model, Sentinel())
    first.close()


@pytest.mark.parametrize("base", ["gpt", "llama"])
def test_train_eval_context_generate(run, place, base):
    """The four commands of the README, on this package's model and on one of transformers."""
    model, adapter, book = place / base, place / f"{base}-adapter", place / f"{base}.ctx"
    settings = ["max_steps=2", "row_tokens=96", "rows_per_step=2", "rows_per_batch=2", "precision=fp32"]
    flags = [part for setting in settings for part in ("--set", setting)]
    code, _, err = run(
        "compress", "train", "--model", model, "--data", place / "data.txt", "--out", adapter, *flags, "--half"
    )
    assert code == 0, err
    assert "removed: asked for" in err

    code, out, err = run(
        "compress", "eval", "--model", model, "--adapter", adapter, "--data", place / "data.txt", "--methods", "all",
        "--removed", "0.5", "--context-tokens", 128, "--num-blocks", 2, "--seeds", "0,1", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    summary = {(line["method"], line["removed"]): line for line in told["summary"]}
    assert {skip["method"] for skip in told["skipped"]} == {"quantised"}
    assert {method for method, _ in summary} == set(METHODS) - {"quantised"} and ("full", 0.0) in summary
    for (method, removed), line in summary.items():
        assert line["num_seeds"] == 2
        if method != "full":
            assert line["achieved_removed"] == pytest.approx(removed, abs=0.01), method

    code, out, err = run(
        "compress", "context", "--model", model, "--adapter", adapter, "--file", place / "page.txt", "--out", book,
        "--removed", "0.6", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert 0 < result["entries"] < result["tokens"]
    assert result["file_bytes"] == book.stat().st_size

    asked = ["--model", model, "--adapter", adapter, "--context", book, "--max-new-tokens", 8, "--json"]
    code, out, err = run("generate", *asked, "--prompt", " The sea")
    assert code == 0, err
    first = json.loads(out)
    assert first["usage"]["context_tokens"] == result["tokens"]
    assert first["usage"]["new_tokens"] <= 8
    assert json.loads(run("generate", *asked, "--prompt", " The sea")[1])["ids"] == first["ids"]

    more = place / f"{base}-more.ctx"
    code, out, err = run(
        "compress", "context", "--model", model, "--adapter", adapter, "--file", place / "page.txt", "--append", book,
        "--out", more, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["tokens"] > result["tokens"]
    again = ["compress", "context", "--file", place / "page.txt", "--append", book, "--out", place / "again.ctx"]
    code, _, err = run(*again, "--model", model, "--adapter", adapter, "--removed", 0.5, "--sentences")
    assert code == 2
    assert "leave out --removed, --sentences" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "eval", "--data", "{page}", "--methods", "locl"], "Did you mean 'local'"),
        (["compress", "eval", "--data", "{page}", "--methods", "sentinel"], "--adapter"),
        (["compress", "eval", "--data", "{page}", "--removed", "half"], "numbers with commas"),
        (["compress", "eval", "--data", "{page}", "--removed", "1.5"], "between 0 and 1"),
        (["compress", "context", "--file", "{page}", "--out", "{page}"], "exists"),
        (["compress", "context", "--file", "{page}", "--out", "{new}"], "--adapter"),
        (["compress", "context", "--file", "{page}", "--out", "{new}", "--sentences", "--removed", "0.5"], "leave out"),
        (["compress", "context", "--file", "{page}", "--out", "{new}", "--max-bytes", "9", "--removed", "0.5"], "held"),
        (
            ["compress", "context", "--file", "{page}", "--out", "{new}", "--adapter", "tiny-gpt"],
            "is a model, not an adapter",
        ),
        (["generate", "--model", "tiny-gpt", "--context", "{page}", "--prompt", "x"], "damaged, or no context"),
        (["compress", "train", "--model", "{page}", "--data", "{page}", "--out", "{new}"], "is a file"),
    ],
)
def test_mistakes_are_named(run, place, arguments, message):
    filled = [part.format(page=place / "page.txt", new=place / "new.ctx") for part in arguments]
    code, _, err = run(*filled)
    assert code == 2
    assert message in err
    assert err.count("thoughtformer:") == 1 and "Traceback" not in err
    assert not (place / "new.ctx").exists()


def test_readings_are_plain():
    """A row drawn without folding is read whole."""
    nothing = FoldingSettings(max_removed=0.0, every_fraction=0.0)
    folded = fold_row(list(range(50)), nothing, 1, np.random.default_rng(0))
    assert folded.reading == RowReading(list(range(50)), 0, [])
    assert (folded.achieved, folded.average) == (0, 0)

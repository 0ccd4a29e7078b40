"""Training as a user does it: whole runs on a small model, resumed, refused, interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from prose import PAGE, prose, tiny_tokenizer
from thoughtformer.errors import ConfigError, CorpusError, OutputError
from thoughtformer.models.loading import load
from thoughtformer.recipes import RECIPES, recipe
from thoughtformer.train import ModelShape, Recipe, train
from thoughtformer.train.folder import RECIPE_FILE
from thoughtformer.train.trainer import SentenceTrainer

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore:.*lr_scheduler.step.*", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with text, a tokenizer, and a cache of its own."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "data.txt").write_text(
        "\n<|endoftext|>\n".join(prose(4000, seed=seed) for seed in range(8)), encoding="utf-8"
    )
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def _cache(place, monkeypatch):
    monkeypatch.setenv("THOUGHTFORMER_CACHE", str(place / "cache"))


def small_recipe(place: Path, **changes: object) -> Recipe:
    settings: dict[str, object] = {
        "name": "small",
        "model": ModelShape(
            hidden_size=32, num_encoder_layers=1, num_body_layers=1, num_attention_heads=2, max_sentence_tokens=64
        ),
        "tokenizer": str(place / "tokenizer"),
        "row_tokens": 64,
        "rows_per_step": 4,
        "rows_per_batch": 2,
        "max_steps": 6,
        "precision": "fp32",
        "save_every_steps": 3,
        "log_every_steps": 2,
    }
    return Recipe(**(settings | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def straight(place) -> Path:
    """A run of six steps without a break."""
    os.environ["THOUGHTFORMER_CACHE"] = str(place / "cache")
    train(small_recipe(place), [place / "data.txt"], place / "straight")
    return place / "straight"


def test_run_leaves_a_loadable_model(straight):
    model, tokenizer = load(straight)
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 64
    assert model.config.use_cache
    assert tokenizer.insert_sentence_ends
    result = json.loads((straight / "training.json").read_text())
    assert result["steps"] == 6
    assert result["tokens"] == 6 * 4 * 64
    assert result["documents"] == 8
    assert {"torch", "transformers"} <= result["versions"].keys()
    assert not (straight / ".writing").exists()
    assert list((straight / "logs").glob("events*"))
    assert Recipe.from_file(straight / "recipe.json").name == "small"


def test_losses_are_logged_apart(straight):
    history = json.loads((straight / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        low, high = sorted((line["loss_tokens"], line["loss_sentence_ends"]))
        assert low <= line["loss"] <= high


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_equals_straight(place, straight, optimizer, tmp_path):
    """Three steps, a crash in the fourth, and the rest: the same weights as six in a row."""
    expected = straight
    if optimizer != "muon":
        expected = tmp_path / "straight"
        train(small_recipe(place, optimizer=optimizer), [place / "data.txt"], expected)
    changed = small_recipe(place, optimizer=optimizer)
    original = SentenceTrainer.compute_loss

    def failing(self, *args, **kwargs):
        if self.state.global_step >= 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentenceTrainer, "compute_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            train(changed, [place / "data.txt"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    # A run that began before some key of the recipe was there goes on.
    file = tmp_path / "out" / RECIPE_FILE
    values = json.loads(file.read_text())
    assert values["model"].pop("body_visibility_settings") is None
    file.write_text(json.dumps(values))
    # The run goes on from a copy of its text: what counts is the ids, not where the file lies or when it changed.
    (tmp_path / "moved.txt").write_bytes((place / "data.txt").read_bytes())
    train(changed, [tmp_path / "moved.txt"], tmp_path / "out", resume=True)
    resumed = weights(tmp_path / "out")
    for name, weight in weights(expected).items():
        assert torch.equal(weight, resumed[name]), name
    assert not torch.equal(weight, weights(tmp_path / "out" / "checkpoint-3")[name])


def test_a_finished_run_is_not_trained_on(place, tmp_path):
    """Neither when its model is written, nor when it was stopped between the last checkpoint and that."""
    out, data = tmp_path / "out", [place / "data.txt"]
    done = train(small_recipe(place), data, out)
    before, stamp = weights(out), (out / "model.safetensors").stat().st_mtime_ns
    assert train(small_recipe(place), data, out, resume=True) == done
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    for name in ("training.json", "model.safetensors"):
        (out / name).unlink()
    again = train(small_recipe(place), data, out, resume=True)
    assert (again.steps, again.last_loss) == (done.steps, done.last_loss)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(out).items())


def test_a_run_that_never_began_is_in_nobodys_way(place, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "short.txt").write_text(PAGE[:200])
    with pytest.raises(CorpusError, match="makes 1 rows"):
        train(small_recipe(place), [tmp_path / "short.txt"], out)
    assert train(small_recipe(place, max_steps=1), [place / "data.txt"], out).steps == 1


def test_full_disk_leaves_the_last_checkpoint_whole(place, tmp_path, monkeypatch):
    import errno

    original = SentenceTrainer._save_rng_state

    def full(self, output_dir):
        if "checkpoint-6" in output_dir:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, output_dir)

    monkeypatch.setattr(SentenceTrainer, "_save_rng_state", full)
    with pytest.raises(OutputError, match=r"couldn't write checkpoint-6.*Kept whole: checkpoint-3.*--resume"):
        train(small_recipe(place), [place / "data.txt"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-3"]
    assert not (tmp_path / "out" / ".writing").exists()
    assert len(weights(tmp_path / "out" / "checkpoint-3")) > 3


def test_safetensors_own_error_is_met_too(place, tmp_path, monkeypatch):
    def full(self, output_dir, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(SentenceTrainer, "save_model", full)
    with pytest.raises(OutputError, match=r"couldn't write checkpoint-3.*no checkpoint yet"):
        train(small_recipe(place), [place / "data.txt"], tmp_path / "out")


def test_too_little_text_is_refused(place, tmp_path):
    (tmp_path / "short.txt").write_text(PAGE[:200])
    with pytest.raises(CorpusError, match=r"makes 1 rows of 64 tokens, but 2 are computed at once"):
        train(small_recipe(place), [tmp_path / "short.txt"], tmp_path / "out")


def test_resuming_on_other_data_is_refused(place, straight, tmp_path):
    (tmp_path / "other.txt").write_text(prose(9000, seed=77))
    with pytest.raises(OutputError, match="reads other data: it had 8 documents"):
        train(small_recipe(place), [tmp_path / "other.txt"], straight, resume=True)


def test_a_checkpoint_is_a_model(straight):
    model, tokenizer = load(straight / "checkpoint-3")
    assert tokenizer.max_sentence_tokens == model.config.max_sentence_tokens == 64


def test_what_is_wrong_is_refused_before_the_old_run_goes(place, tmp_path):
    out = tmp_path / "out"
    train(small_recipe(place, max_steps=1), [place / "data.txt"], out)
    with pytest.raises(CorpusError, match="nowhere"):
        train(small_recipe(place), [tmp_path / "nowhere"], out, overwrite=True)
    assert load(out)


def test_used_folders(place, straight, tmp_path):
    data = [place / "data.txt"]
    with pytest.raises(OutputError, match="not empty"):
        train(small_recipe(place), data, straight)
    with pytest.raises(OutputError, match="another recipe: seed was 0, is 1"):
        train(small_recipe(place, seed=1), data, straight, resume=True)
    with pytest.raises(OutputError, match="no checkpoint"):
        train(small_recipe(place), data, tmp_path / "new", resume=True)
    with pytest.raises(OutputError, match="exclude each other"):
        train(small_recipe(place), data, straight, resume=True, overwrite=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".recipe.json.writing-1-2").write_text("{")
    train(small_recipe(place, max_steps=1), data, tmp_path / "killed")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no training run to overwrite"):
        train(small_recipe(place), data, tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        train(small_recipe(place), data, tmp_path / "file")


def test_overwrite_replaces_the_run_and_nothing_else(place, tmp_path):
    out = tmp_path / "out"
    first = small_recipe(place, max_steps=2, save_every_steps=1)
    train(first, [place / "data.txt"], out)
    (out / "notes.md").write_text("mine")
    train(replace(first, seed=5, max_steps=1), [place / "data.txt"], out, overwrite=True)
    assert (out / "notes.md").read_text() == "mine"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((out / "recipe.json").read_text())["seed"] == 5


def test_plain_gpt_learns_without_ends(place, tmp_path):
    shape = ModelShape(
        hidden_size=32,
        num_encoder_layers=0,
        num_body_layers=2,
        num_attention_heads=2,
        body_visibility="causal",
        max_sentence_tokens=64,
    )
    plain = small_recipe(place, model=shape, sentence_ends=False, max_steps=2)
    train(plain, [place / "data.txt"], tmp_path / "out")
    model, tokenizer = load(tmp_path / "out")
    assert model.config.sentence_end_token_id is None
    assert 1 not in tokenizer("One. Two. Three.")["input_ids"]


def test_loss_falls(place, tmp_path):
    longer = small_recipe(place, max_steps=60, save_every_steps=60, log_every_steps=10, learning_rate=1e-2)
    train(longer, [place / "data.txt"], tmp_path / "out")
    state = json.loads((tmp_path / "out" / "checkpoint-60" / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert losses[-1] < losses[0] - 1.0


def test_two_processes_equal_one(place, straight, tmp_path):
    """torchrun with two ranks takes the same steps: same rows a step, same weights but for summation order."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "import torch\n"
        "from thoughtformer.train import Recipe, train\n"
        "torch.set_num_threads(1)\n"
        "train(Recipe.from_file(sys.argv[1]), [sys.argv[2]], sys.argv[3])\n"
    )
    (tmp_path / "recipe.json").write_text(small_recipe(place).to_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", str(script)]
    command += [str(tmp_path / "recipe.json"), str(place / "data.txt"), str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # Single-process order differs in which rows share a batch, not in which share a step.
    for name, weight in weights(tmp_path / "out").items():
        torch.testing.assert_close(weight, weights(straight)[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_complete(name):
    again = Recipe.from_dict(json.loads(recipe(name).to_json()))
    assert again == recipe(name)


def test_the_bundled_pair_is_equal_but_for_the_method():
    compressed, plain = recipe("tiny-gpthf"), recipe("tiny-gpt")
    shared = [f for f in compressed.to_dict() if f not in ("name", "model", "sentence_ends")]
    assert all(compressed.to_dict()[field] == plain.to_dict()[field] for field in shared)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 2}, r"unknown key 'epoch'. Did you mean 'epochs'\?"),
        ({"model": {"hiden_size": 2}}, r"unknown key 'model.hiden_size'. Did you mean 'hidden_size'\?"),
        ({"epochs": "two"}, "epochs='two' is a str; give int"),
        ({"epochs": True}, "epochs=True is a bool"),
        ({"model": 3}, "model=3 must hold keys"),
        ({"epochs": 0}, "epochs=0 must be 1 or more"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"rows_per_step": 3, "rows_per_batch": 2}, "not a multiple"),
        ({"sentence_ends": False}, "sentence_ends=false"),
        ({"beta1": 1.5}, "beta1=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"model": {"max_sentence_tokens": 1}}, "max_sentence_tokens=1"),
        ({"model": {"num_attention_heads": 0}}, "num_attention_heads=0"),
        ({"model": {"body_visibility": "hybird"}}, "Did you mean 'hybrid'"),
    ],
)
def test_wrong_recipes(values, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(values)


def test_settings_on_top_of_a_recipe():
    changed = recipe("tiny-gpthf").with_settings(["learning_rate=3e-4", "model.num_body_layers=7", "max_bytes=null"])
    assert (changed.learning_rate, changed.model.num_body_layers, changed.max_bytes) == (3e-4, 7, None)
    for setting, message in (
        ("epochs", "key=value"),
        ("modl.x=1", "no group 'modl'"),
        ("a=1", "unknown key 'a'"),
        ("name=@x", "not YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe("tiny-gpthf").with_settings([setting])
    with pytest.raises(ConfigError, match=r"no recipe 'tiny-gpt2'. Did you mean 'tiny-gpt'\?"):
        recipe("tiny-gpt2")


def test_recipe_files(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: mine\nlearning_rate: 3e-3\nmodel:\n  hidden_size: 64\n")
    assert Recipe.from_file(tmp_path / "recipe.yaml").model.hidden_size == 64
    # The last ones are what YAML's own constructors raise other errors for.
    damaged = ["a: [", "seed: 2026-99-99", "seed: 0x_", 'seed: !!int "x"', "seed: !!timestamp x", "[" * 5000]
    for content, message in (("- 1", "a list"), *((content, "neither YAML nor JSON") for content in damaged)):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            Recipe.from_file(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="can't read"):
        Recipe.from_file(tmp_path / "missing.yaml")

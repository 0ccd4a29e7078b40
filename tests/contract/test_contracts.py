"""What holds for every module and every name, so that none can be added untested."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import thoughtformer
from lms import tiny_lm
from thoughtformer.compression.adapter import read_adapter_manifest
from thoughtformer.errors import ConfigError
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.models.loading import ASSETS, BUNDLED, BUNDLED_ADAPTERS, load


def modules() -> list[str]:
    found = pkgutil.walk_packages(thoughtformer.__path__, "thoughtformer.")
    return [module.name for module in found if not module.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_exports_exist(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for exported in getattr(module, "__all__", []):
        assert hasattr(module, exported), exported


def test_top_level_names():
    for name in thoughtformer.__all__:
        assert getattr(thoughtformer, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = thoughtformer.nothing


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_are_as_promised(name):
    """Half precision on disk, at most 16 MB, float32 in memory, a card beside them."""
    weights = ASSETS / name / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    model, tokenizer = load(name)
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings >= 1024
    assert tokenizer.insert_sentence_ends == (model.config.sentence_end_token_id is not None)
    assert (ASSETS / name / "README.md").exists()
    assert not list((ASSETS / name).glob("*.bin"))


def test_bundled_pair_has_equal_parameters():
    counts = [sum(parameter.numel() for parameter in load(name)[0].parameters()) for name in BUNDLED]
    assert abs(counts[0] - counts[1]) <= 0.01 * counts[1]
    assert 5_000_000 <= counts[0] <= 8_000_000


@pytest.mark.parametrize("name", BUNDLED_ADAPTERS)
def test_bundled_adapters_are_as_promised(name):
    """At most 2 MB, made for the bundled GPT, with a card; the README's lines run."""
    folder = ASSETS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2_000_000
    assert (folder / "README.md").exists()
    assert not list(folder.glob("*.bin"))
    model, tokenizer = load("tiny-gpt")
    assert read_adapter_manifest(folder)["base"] == fingerprint(model)
    inputs = tokenizer("The sea was calm that morning. The old man " * 12, return_tensors="pt")
    before = model(**inputs).logits
    with thoughtformer.compress(model, "sentinel", adapter=name) as compressed:
        output = compressed.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True, do_sample=False)
    held = int(output.cache.num_entries[0])
    assert held < 0.5 * output.sequences.shape[1]
    assert torch.equal(model(**inputs).logits, before)


def test_names_known_before_anything_heavy_is_imported_are_those_that_there_are():
    from thoughtformer import names
    from thoughtformer.bench import memory, quality, speed
    from thoughtformer.compression import METHODS
    from thoughtformer.decode import DRAFTERS
    from thoughtformer.recipes import RECIPES

    assert set(names.METHOD_NAMES) == set(METHODS)
    assert set(names.RECIPE_NAMES) == set(RECIPES)
    assert set(names.DRAFTER_NAMES) == set(DRAFTERS)
    for theme, module in (("speed", speed), ("memory", memory), ("quality", quality)):
        assert set(names.BENCH_CASES[theme]) == set(module.CASES)
    assert all((names.ASSETS / name).is_dir() for name in (*names.BUNDLED, *names.BUNDLED_ADAPTERS))


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("SnapKVPress", "snapkv"),
        ("pyramid_kv", "snapkv"),
        ("streaming_llm", "streaming"),
        ("StreamingLLMPress", "streaming"),
        ("knorm", "h2o"),
        ("ExpectedAttentionPress", "expected_attention"),
        ("TOVAPress", "tova"),
        ("RandomPress", "random"),
    ],
)
def test_methods_of_kvpress_are_told_what_is_nearest_here(name, here):
    with pytest.raises(ConfigError, match=f"Of those here '{here}' is nearest to kvpress's {name}"):
        thoughtformer.compress(tiny_lm(), name)

"""What holds for every rule and every module, so that none can be added untested."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import thoughtformer
from conftest import END, START, VISIBILITIES
from thoughtformer.attention import BODY_RULES, EarlierSentences, OwnSentence, RowCounters, dense_mask, read_structure
from thoughtformer.compression.adapter import read_adapter_manifest
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.models.loading import ASSETS, BUNDLED, BUNDLED_ADAPTERS, load

RULES = {**BODY_RULES, "own_sentence": OwnSentence}
VARIED = {
    "own_sentence_and_2": lambda: OwnSentence(2),
    "keep_last_and_1": lambda: BODY_RULES["keep_last"](1),
    "hybrid_and_2": lambda: BODY_RULES["hybrid"](2),
    "earlier_sentences": lambda: EarlierSentences(own=False),
    "earlier_sentences_and_own": lambda: EarlierSentences(own=True),
}
# `a b .` `c d .` `e`, as visibility.py draws it
DRAWN = torch.tensor([5, 6, END, 7, 8, END, 9])
DRAWINGS = {
    "causal": ["1", "11", "111", "1111", "11111", "111111", "1111111"],
    "own_sentence": ["1", "11", "111", "...1", "...11", "...111", "......1"],
    "fast": ["1", ".1", "..1", "..11", "..1.1", "..1..1", "..1..11"],
    "keep_last": ["1", "11", "111", "..11", "..111", "..1111", "..1..11"],
    "hybrid": ["1", "11", "..1", "..11", "..111", "..1..1", "..1..11"],
}


def structure(ids: torch.Tensor):
    return read_structure(
        ids,
        torch.zeros_like(ids),
        RowCounters.zeros(1),
        sentence_end_token_id=END,
        document_start_token_id=START,
    )


def test_every_rule_is_in_the_parity_tests():
    assert set(VISIBILITIES) == {*BODY_RULES, "hourglass"}
    assert set(DRAWINGS) == set(RULES)


@pytest.mark.parametrize("name", list(RULES))
def test_rule_is_as_drawn(name):
    mask = dense_mask(RULES[name](), structure(DRAWN))
    rows = ["".join("1" if seen else "." for seen in row).rstrip(".") for row in mask.tolist()]
    assert rows == DRAWINGS[name]
    assert all(row in (thoughtformer.attention.visibility.__doc__ or "") for row in rows)


@pytest.mark.parametrize("name", [*RULES, *VARIED])
def test_rule_keeps_what_a_later_token_may_read(name, text):
    """What `keeps` drops after a prefix, no later token reads; what it keeps, some continuation reads."""
    rule = (RULES | VARIED)[name]()
    for count in range(1, len(text) + 1):
        prefix = structure(text[:count])
        kept = rule.keeps(prefix, RowCounters.zeros(1).after(prefix))
        whole = torch.cat([text, torch.tensor([5, 6])])
        later = dense_mask(rule, structure(whole))[count:, :count]
        assert not (later & ~kept).any()
        at_once = dense_mask(rule, structure(torch.cat([text[:count], torch.tensor([5])])))[-1, :count]
        assert torch.equal(at_once, kept), "the next ordinary token reads all that is held"


@pytest.mark.parametrize("name", [*RULES, *VARIED])
def test_visibility_never_grows(name, text):
    """For ordinary queries of one document, what was invisible stays so."""
    mask = dense_mask((RULES | VARIED)[name](), structure(text))
    tokens = structure(text)
    queries = (~tokens.is_end).nonzero().flatten().tolist()
    for earlier, later in zip(queries, queries[1:]):
        known = torch.arange(len(text)) < earlier
        assert not (mask[later] & ~mask[earlier] & known).any()


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
    held = int(output.past_key_values.num_entries[0])
    assert held < 0.5 * output.sequences.shape[1]
    assert torch.equal(model(**inputs).logits, before)

"""Checkpoints that can't be used are refused by name; none is ever unpickled."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import thoughtformer
from lms import tiny_lm
from prose import tiny_pair
from thoughtformer import Engine, SamplingParams
from thoughtformer.errors import ArgumentError, CheckpointError, ConfigError, TokenizerError, UnsupportedError
from thoughtformer.models import GPTHFConfig
from thoughtformer.models.loading import load, load_gpthf, load_tokenizer
from thoughtformer.registration import AutoModel
from thoughtformer.text import SentenceTokenizer


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = tiny_pair()
    model.half().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_half_precision_loads_as_float32_on_the_cpu(folder):
    model, tokenizer = load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert load(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert thoughtformer.load is load
    assert tokenizer.max_sentence_tokens == model.config.max_sentence_tokens


def test_auto_classes(folder):
    assert type(AutoConfig.from_pretrained(folder)) is GPTHFConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "GPTHFForCausalLM"
    assert type(AutoModel.from_pretrained(folder)).__name__ == "GPTHFModel"
    assert type(AutoTokenizer.from_pretrained(folder)).__name__ == "SentenceTokenizer"


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    for size in (0, 7, len(file.read_bytes()) // 2):
        file.write_bytes(file.read_bytes()[:size] if size else b"")
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or no safetensors"):
            load(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was loaded",))


def test_pickles_are_never_loaded(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
        load(folder)


def test_another_architecture(folder):
    edit_config(folder, model_type="llama")
    with pytest.raises(CheckpointError, match="holds a 'llama', not a 'gpthf'"):
        load_gpthf(folder)
    with pytest.raises(CheckpointError, match=r"don't fit its config\.json: the file lacks"):
        load(folder)


def test_a_name_of_the_hub(folder, tmp_path, monkeypatch):
    """What was downloaded is found by its name; what wasn't isn't asked for."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--small.model" / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model, _ = load("someone/small.model")
    assert model.num_parameters() == load(folder)[0].num_parameters()
    with pytest.raises(CheckpointError, match=r"hf download someone/other"):
        load("someone/other")


@pytest.mark.parametrize("tied", [False, True])
def test_any_causal_lm_of_transformers(tmp_path, tied):
    """Loaded, written with and compressed as it was; refused where a weight is missing."""
    model, backend = tiny_lm("llama", vocab_size=400), tiny_pair()[1].backend_tokenizer
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    loaded, tokenizer = thoughtformer.load(tmp_path, dtype=torch.float64)
    ids = torch.randint(3, 400, (1, 12))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-9)
    text = "The ferry left."
    expected = model.generate(torch.tensor([tokenizer(text).input_ids]), max_new_tokens=9, do_sample=False)
    params = SamplingParams(max_new_tokens=9, ignore_end_of_text=True)
    assert Engine(loaded, tokenizer).generate([text], params)[0].ids == expected[0, -9:].tolist()
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the file lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        thoughtformer.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_body_layers": 3}, r"lacks model\.stages\.1\.layers\.2"),
        ({"num_body_layers": 1}, r"has a foreign model\.stages\.1\.layers\.1"),
        ({"intermediate_size": 64}, "has another shape of"),
    ],
)
def test_weights_that_do_not_fit_the_configuration(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_folders_that_are_no_models(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a file"):
        load(folder / "config.json")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(folder)


def test_tokenizers_that_do_not_fit(folder):
    edit_config(folder, sentence_end_token_id=7)
    with pytest.raises(TokenizerError, match="closes sentences with id 7"):
        load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="can't read the tokenizer"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"body_visibility": "hybird"}, r"Did you mean 'hybrid'\?"),
        ({"body_positions": "tokens"}, r"Did you mean 'token'\?"),
        ({"num_attention_heads": 3}, "even multiple"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({"num_body_layers": 0}, "num_body_layers=0"),
        ({"sentence_end_token_id": None}, "sentence_end_token_id=None"),
        ({"max_sentence_tokens": 1}, "max_sentence_tokens=1"),
        ({"bos_token_id": 99999}, "bos_token_id=99999"),
        ({"eos_token_id": 99999}, "eos_token_id=99999 is outside the vocabulary of 8192 ids"),
        ({"eos_token_id": [0, -1]}, r"eos_token_id=\[0, -1\] is outside"),
        ({"bos_token_id": 1}, "both 1"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be 1 or more"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be above 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be 0 or more"),
        ({"initializer_range": float("inf")}, "initializer_range=inf must be 0 or more, and finite"),
        ({"vocab_size": "40"}, "vocab_size='40' is a str; give int"),
        ({"hidden_size": 64.0}, "hidden_size=64.0 is a float; give int"),
        ({"recent_sentences": True}, "recent_sentences=True is a bool; give int"),
        ({"body_hidden_size": "wide"}, "body_hidden_size='wide' is a str; give int or None"),
        ({"body_visibility": None}, "body_visibility=None is a NoneType; give str"),
        ({"ends_read_own_summary": "false"}, "ends_read_own_summary='false' is a str; give bool"),
        ({"rebuild_loss_weight": "a"}, "rebuild_loss_weight='a' is a str; give float"),
        ({"eos_token_id": [0, "1"]}, "eos_token_id=.* is a list"),
        ({"num_decoder_layer": 2}, "unknown key 'num_decoder_layer'. Did you mean 'num_decoder_layers'"),
        ({"head_dim": 8}, "head_dim=8 can't be set, it is hidden_size / num_attention_heads"),
    ],
)
def test_configurations_that_contradict_themselves(changes, message):
    with pytest.raises(ConfigError, match=message):
        GPTHFConfig(**changes)


def test_defaults_fit_any_vocabulary():
    assert GPTHFConfig(vocab_size=3).vocab_size == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 4}, "unknown key 'sliding_window'"),
        ({"rope_scaling": {"factor": 2.0}}, "unknown key 'rope_scaling'"),
        ({"num_encoder_layer": 3}, "Did you mean 'num_encoder_layers'"),
    ],
)
def test_keys_that_would_have_no_effect_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GPTHFConfig(**changes)


def test_keys_that_transformers_gives_every_configuration_are_taken(tmp_path):
    shared = {
        "dtype": "float32",
        "attn_implementation": "eager",
        "architectures": ["GPTHFForCausalLM"],
        "max_length": 9,
    }
    GPTHFConfig(**shared, name_or_path="somewhere", output_hidden_states=True).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert GPTHFConfig.from_dict(dict(values)).hidden_size == values["hidden_size"]
    with pytest.warns(UserWarning, match="no next_months_key"):
        assert not hasattr(GPTHFConfig.from_dict(values | {"next_months_key": 1}), "next_months_key")


def test_files_beside_the_weights_are_not_passed_over(folder):
    """transformers takes some of them for missing where they are damaged, and raises what it likes for others."""
    for name, error in (("generation_config.json", CheckpointError), ("tokenizer_config.json", TokenizerError)):
        content = (folder / name).read_bytes()
        for damaged in (b"null", b"[1]", b"", content[:-9], b"\xff" + content):
            (folder / name).write_bytes(damaged)
            with pytest.raises(error, match=name):
                load(folder)
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(error, match=name):
            load(folder)
        (folder / name).rmdir()
        (folder / name).write_bytes(content)
    (folder / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    with pytest.raises(CheckpointError):
        load(folder)


def test_settings_of_tokenizers_are_checked():
    with pytest.raises(ArgumentError, match="Did you mean 'insert_sentence_ends'"):
        load_tokenizer("tiny-gpthf", insert_sentense_ends=False)
    tokenizer = load_tokenizer("tiny-gpthf", max_sentence_tokens=None)
    with pytest.raises(ConfigError, match="Did you mean 'max_sentence_tokens'"):
        SentenceTokenizer.from_backend(tokenizer.backend_tokenizer, max_sentense_tokens=5)
    with pytest.raises(ArgumentError, match="'retrun_tensors'"):
        tokenizer("It was late.", retrun_tensors="pt")
    with pytest.raises(UnsupportedError, match="split_special_tokens=False"):
        tokenizer("It was late.", split_special_tokens=False)
    ids = tokenizer("It was late.")["input_ids"]
    for call in (tokenizer.decode, lambda ids, **more: tokenizer.batch_decode([ids], **more)):
        with pytest.raises(ArgumentError, match="'skip_specials'"):
            call(ids, skip_specials=True)
    with pytest.raises(ArgumentError, match="'add_specials'"):
        tokenizer.tokenize("It was late.", add_specials=True)

"""Views and their model side by side: in threads, under hooks, compiled, quantised, copied. None meets another."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings

import accelerate
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import SWITCHES, tiny_model
from lms import CONFIGS, TINY_METHODS, in_turn, policy, random_ids, tiny_compressed, tiny_lm
from prose import tiny_pair
from thoughtformer import compress
from thoughtformer.compression import (
    CompressedModel,
    Context,
    Full,
    Local,
    Sentinel,
    SentinelAdapter,
)
from thoughtformer.compression.adapter import AdapterConfig
from thoughtformer.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from thoughtformer.models import handed_in, transformers_api
from thoughtformer.models.backbone import backbone_of

#: One setting of each method.
METHODS = {method.name: method for method in reversed(TINY_METHODS.values()) if method.name != "full"}


peft_asks_by_an_old_name = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def configurations(model):
    """The configuration that each module reads."""
    return [module.__dict__["config"] for module in model.modules() if "config" in module.__dict__]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "plain"])
@torch.no_grad()
def test_views_and_their_model_run_in_threads(family):
    """Each thread's logits are those it has alone, LoRA of a sentinel adapter or not."""
    model, ids = tiny_lm(family), random_ids(2, 60)
    callers = {"the model itself": model} | {name: tiny_compressed(model, method) for name, method in METHODS.items()}
    expected = {name: caller(ids).logits for name, caller in callers.items()}
    assert len({round(float(logits.sum()), 6) for logits in expected.values()}) == len(callers), "all differ"
    wrong: list[str] = []

    def call(name):
        for _ in range(3):
            with torch.no_grad():
                if not torch.allclose(callers[name](ids).logits, expected[name], rtol=0, atol=1e-9):
                    wrong.append(name)

    threads = [threading.Thread(target=call, args=(name,)) for name in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_the_model_is_bare_while_an_adapter_is_in_it():
    model, ids = tiny_lm(), random_ids(2, 40)
    bare = model(ids).logits
    with tiny_compressed(model, Sentinel(policy=policy())) as compressed:
        assert not torch.allclose(compressed(ids).logits, bare)
        assert torch.equal(model(ids).logits, bare)


@pytest.mark.parametrize("family", [*CONFIGS, "plain"])
def test_modules_read_the_configuration_again_once_the_last_view_is_gone(family):
    model = tiny_lm(family)
    config, backend = model.config, model.config._attn_implementation
    first, second = compress(model, Full()), compress(model, Local(removed=0.5))
    assert model.config is config
    assert config._attn_implementation == backend
    first.close()
    second(random_ids(1, 9))
    second.close()
    assert all(held is config for held in configurations(model))
    third = compress(model, Full())  # never closed
    del third
    gc.collect()
    assert all(held is config for held in configurations(model))
    with pytest.raises(ConfigError, match="takes no adapter"):  # one that is refused leaves nothing either
        compress(model, Full(), adapter="tiny-gpt-sentinel")
    assert all(held is config for held in configurations(model))


def test_a_view_may_be_collected_while_another_is_made():
    """The collector runs wherever it likes, also in the thread that is just counting views: it must not wait for it."""
    model = tiny_lm("llama")
    before = configurations(model)
    first = compress(model, "full")
    first.myself = [first]  # so that only the collector finds it
    closed = compress(model, "full")
    with handed_in._counting():
        del first
        gc.collect()
        closed.close()  # as a generator does that the collector finds inside a with block
        assert list(handed_in._LEFT) == [model, model], "whoever holds the lock sees to it afterwards"
    second = compress(model, "full")
    assert handed_in._NUM_VIEWS[model] == 1
    second.close()
    assert all(mine is theirs for mine, theirs in zip(configurations(model), before))


def test_copies_of_a_model_have_no_views():
    model, ids = tiny_lm(), random_ids(1, 30)
    with compress(model, Local(removed=0.6)) as compressed:
        expected = compressed(ids).logits
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(type(config) is type(model.config) for config in configurations(copied))
            assert all(config is copied.config for config in configurations(copied))
            close(copied(ids).logits, model(ids).logits)
            with compress(copied, Local(removed=0.6)) as view:
                close(view(ids).logits, expected)


def test_a_backend_that_changes_under_a_view_is_followed_or_refused():
    model, ids = tiny_lm(dtype=torch.float32), random_ids(1, 30)
    compressed = compress(model, Full())
    model.set_attn_implementation("eager")
    assert torch.equal(compressed(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="flex_attention"):
        compressed(ids)


def test_attention_that_is_swallowed_on_the_way_is_refused(monkeypatch):
    """A module between that drops keyword arguments would leave plain causal attention, without a word."""
    model, ids = tiny_lm(), random_ids(1, 30)
    compressed = compress(model, Local(removed=0.6))
    layer = model.model.layers[1]
    forward = layer.forward

    def dropping(*args, **kwargs):
        return forward(*args, **{name: value for name, value in kwargs.items() if name != "handed_in"})

    monkeypatch.setattr(layer, "forward", dropping)
    with pytest.raises(UnsupportedError, match="2 of 3 layers"):
        compressed(ids)


def test_probing_changes_neither_mode_nor_draws():
    model = tiny_lm(attention_dropout=0.5).train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    compress(model, Full())
    assert torch.equal(torch.rand(3), expected)
    assert model.training


# What people wrap models in.


def _by_name(offload_folder):
    return {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }


WITHOUT_ADAPTER = ["full", *(name for name, method in METHODS.items() if not method.needs_adapter)]
#: Ways to leave weights elsewhere.
PLACES = ["cpu", "disk", "device_map"]


@pytest.mark.parametrize(("method", "kind"), in_turn(WITHOUT_ADAPTER, PLACES, always=()))
@torch.no_grad()
def test_offloaded_models(method, kind, tmp_path):
    """accelerate's hooks copy what a call is given, and leave the weights elsewhere."""
    ids = random_ids(1, 40)
    method = METHODS.get(method, Full())
    model = tiny_lm(dtype=torch.float32)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    expected = compress(model, method)(ids).logits
    if kind == "cpu":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif kind == "disk":
        model = accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=_by_name(tmp_path), offload_folder=str(tmp_path / "offload")
        )
    with compress(model, method) as compressed:
        torch.testing.assert_close(compressed(ids).logits, expected, rtol=0, atol=1e-5)
        cache = compressed.new_cache(1)
        steps = [compressed(ids[:, [column]], cache=cache).logits for column in range(ids.shape[1])]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-4)
        written = compressed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        if isinstance(method, Full):
            assert torch.equal(written, plain)


@pytest.mark.parametrize("kind", ["cpu", "disk", "device_map"])
@pytest.mark.parametrize("name", ["causal", "hybrid_depths", "hourglass_recent", "everything"])
@torch.no_grad()
def test_an_offloaded_gpthf(name, kind, tmp_path):
    """Whatever reads a weight asks the module for it, and no result comes back through an argument."""
    settings = {"causal": {"visibility": "causal"}, **SWITCHES}[name]
    model, ids = tiny_model(**settings).float(), random_ids(1, 40)
    ids[:, 7::9], ids[:, 0] = 1, 0
    expected = model(ids, output_hidden_states=True)
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    if kind == "cpu":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif kind == "disk":
        model = accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path / "model")
        places = {
            name: "cpu" for name, _ in [*model.named_children(), *model.model.named_children()] if name != "model"
        }
        places = {
            name if name in ("lm_head", "sentence_losses") else f"model.{name}": place for name, place in places.items()
        }
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places | {"model.stages": "disk"}, offload_folder=str(tmp_path / "offload")
        )
    actual = model(ids, output_hidden_states=True)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    for state, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, other, rtol=0, atol=1e-5)
    assert model.device == torch.device("cpu")
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)


def test_a_gpthf_on_several_devices_is_refused_in_words():
    model = tiny_model()
    model.hf_device_map = {"model.stages.0": 0, "model.stages.1": 1, "lm_head": "cpu"}
    with pytest.raises(UnsupportedError, match="one device"):
        model(random_ids(1, 5))


def test_an_adapter_on_an_offloaded_model_is_refused_in_words(tmp_path):
    model = accelerate.cpu_offload(tiny_lm(), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="offload"):
        SentinelAdapter(backbone_of(model), AdapterConfig())


@peft_asks_by_an_old_name
@torch.no_grad()
def test_peft_models_are_compressed_with_their_adapters():
    model, ids = tiny_lm(), random_ids(1, 40)
    bare = model(ids).logits
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    expected = peft(ids).logits
    assert not torch.allclose(expected, bare)
    for wrapped in (peft, peft.get_base_model()):
        with compress(wrapped, Full()) as compressed:
            close(compressed(ids).logits, expected)
    with pytest.raises(UnsupportedError, match="LoRA already"):
        tiny_compressed(peft.get_base_model(), Sentinel())
    merged = peft.merge_and_unload()
    with compress(merged, Full()) as compressed:
        close(compressed(ids).logits, expected)


@peft_asks_by_an_old_name
def test_virtual_tokens_are_refused_in_words():
    peft = get_peft_model(tiny_lm(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="PREFIX_TUNING puts virtual tokens"):
        compress(peft, Full())


@torch.no_grad()
def test_quantised_models():
    """torch's own int8, whose linear layers have no weights to look at."""
    model, ids = tiny_lm(dtype=torch.float32), random_ids(1, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, but in use
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        expected = quantised(ids).logits
        assert not torch.allclose(expected, model(ids).logits)
        for name, method in METHODS.items():
            if name != "sentinel":
                with compress(quantised, method) as compressed:
                    compressed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
        with compress(quantised, Full()) as compressed:
            assert torch.equal(compressed(ids).logits, expected)


@torch.no_grad()
def test_packed_weights_count_in_fingerprints(tmp_path):
    """A context of one quantised model is refused by another that differs in one linear layer alone."""
    model, ids = tiny_lm(dtype=torch.float32), random_ids(1, 30)

    def quantised() -> CompressedModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compress(torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8), Full())

    first, again = quantised(), quantised()
    Context.read(first, ids[0]).save(tmp_path / "a.ctx")
    Context.load(again, tmp_path / "a.ctx")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)
    with pytest.raises(CheckpointError, match="model was"):
        Context.load(quantised(), tmp_path / "a.ctx")


@torch.no_grad()
def test_models_whose_weights_are_not_of_their_dtype():
    """Keys are held as the model computes them: here weights in bfloat16 that are computed in float32."""
    model, ids = tiny_lm(dtype=torch.float32), random_ids(1, 30)
    with compress(model, Full()) as compressed:
        compressed.to(torch.bfloat16)
        assert compressed.new_cache(1).store.keys[0].dtype == torch.bfloat16
        compressed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)


@torch.no_grad()
def test_resized_embeddings_under_a_view():
    model, ids = tiny_lm(), random_ids(1, 30)
    compressed = compress(model, Full())
    with_adapter = tiny_compressed(tiny_lm(), Sentinel())
    for view in (compressed, with_adapter):
        view.model.resize_token_embeddings(view.model.config.vocab_size + 3)
    longer = ids.clone()
    longer[0, 4] = model.config.vocab_size - 1
    close(compressed(longer).logits, model(longer).logits)
    with pytest.raises(InputError, match="a vocabulary of 40, but the model has 43"):
        with_adapter(ids)


def test_saving_a_view(tmp_path):
    model, ids = tiny_lm(), random_ids(1, 10)
    compress(model, Full()).save_pretrained(tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    close(saved(ids).logits, model(ids).logits)
    assert saved.config._attn_implementation == "sdpa"
    with pytest.raises(UnsupportedError, match="close"):
        tiny_compressed(model, Sentinel()).save_pretrained(tmp_path / "other")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["gpthf", "compressed"])
def test_compiled_models_run_uncompiled_with_one_warning(kind, monkeypatch):
    monkeypatch.setattr(transformers_api, "_SAID", set())
    model = tiny_pair()[0] if kind == "gpthf" else compress(tiny_lm(), Local(removed=0.6))
    ids = random_ids(1, 30)
    expected = model(ids).logits
    compiled = torch.compile(model)
    with pytest.warns(UserWarning, match="runs uncompiled"):
        close(compiled(ids).logits, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(compiled(ids).logits, expected)
        if kind == "compressed":
            close(compress(torch.compile(model.model), Local(removed=0.6))(ids).logits, expected)

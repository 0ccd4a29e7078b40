"""Every supported architecture: its own logits when nothing is compressed, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MistralConfig, Qwen2Config

from lms import CONFIGS, VOCAB, random_ids, tiny_compressed, tiny_lm
from thoughtformer import compress
from thoughtformer.compression import Full, Local, Sentinel
from thoughtformer.errors import ContextOverflowError, UnsupportedError
from thoughtformer.models import backbone as backbones
from thoughtformer.models.backbone import SUPPORTED_MODELS, backbone_of
from thoughtformer.models.transformers_api import CACHE_NAME


def test_every_supported_architecture_is_tested():
    assert set(CONFIGS) == set(SUPPORTED_MODELS)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*CONFIGS, "plain"])
def test_nothing_compressed_is_the_base_bit_for_bit(family, backend):
    """Read at once, prefilled and step by step: the very same operations."""
    model = tiny_lm(family, backend=backend)
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        first = model(ids[:, :15], use_cache=True)
        stepped = [first.logits]
        for column in range(15, 20):
            stepped.append(model(ids[:, [column]], use_cache=True, **{CACHE_NAME: first[CACHE_NAME]}).logits)
        with compress(model, Local(removed=0.0)) as compressed:
            assert torch.equal(compressed(ids, use_cache=False).logits, expected)
            cache = compressed.new_cache(2)
            ours = [compressed(ids[:, :15], cache=cache).logits]
            ours += [compressed(ids[:, [column]], cache=cache).logits for column in range(15, 20)]
        assert torch.equal(torch.cat(ours, dim=1), torch.cat(stepped, dim=1))
        assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", [*CONFIGS, "plain"])
def test_nothing_is_left_behind(family):
    """After the `with`: the same modules, parameters, configuration and logits, sentinels and LoRA or not."""
    model = tiny_lm(family)
    ids = random_ids(2, 40)
    names, config = [name for name, _ in model.named_parameters()], copy.deepcopy(model.config.to_dict())
    modules = [(name, type(module)) for name, module in model.named_modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with torch.no_grad():
        expected = model(ids).logits
        with tiny_compressed(model, Sentinel()) as compressed:
            changed = compressed(ids).logits
        assert not torch.equal(changed, expected), "the adapter's LoRA must act inside"
        assert torch.equal(model(ids).logits, expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == (config.get("_attn_implementation") or "sdpa")


def test_a_model_that_shares_the_configuration_is_not_affected():
    """transformers doesn't copy a configuration: while one model is compressed, the other's attention is its own."""
    model = tiny_lm("llama")
    other = AutoModelForCausalLM.from_config(model.config).double().eval()
    assert other.config is model.config
    ids = random_ids(1, 12)
    inside = []

    def attend(layer, query, key, value, *, original, **_):
        inside.append(other(ids).logits)
        return original(query, key, value, None)

    view = backbone_of(model)
    with torch.no_grad():
        expected = other(ids).logits
        view.forward(view.embed(ids), torch.arange(12)[None], attend)
    assert inside and all(torch.equal(logits, expected) for logits in inside)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2), "bloom"),
        (
            MistralConfig(
                vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, sliding_window=8,
            ),
            "window",
        ),
        (
            Qwen2Config(
                vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, use_sliding_window=True, max_window_layers=1, sliding_window=8,
            ),
            "sliding_attention",
        ),
        (
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            ),
            "dynamic",
        ),
    ],
    ids=["architecture", "window", "some_windows", "dynamic_rope"],
)  # fmt: skip
def test_what_would_not_be_exact_is_refused_by_name(config, message):
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedError, match=message):
        compress(model, "full")


def test_attention_backends_are_refused_by_name():
    model = tiny_lm("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="flex_attention"):
        compress(model, "full")


def test_a_gpthf_that_folds_itself_is_refused(model):
    if model.config.body_visibility == "causal" and model.config.num_encoder_layers == 0:
        pytest.skip("the plain case")
    with pytest.raises(UnsupportedError, match="folds its sentences itself"):
        compress(model, "full")


@pytest.mark.parametrize("family", ["llama", "gpt2", "plain"])
def test_past_the_trained_length(family):
    model = tiny_lm(family)
    limit = model.config.max_position_embeddings
    ids = random_ids(1, limit + 1)
    compressed = compress(model, Full())
    with pytest.raises(ContextOverflowError, match=f"trained for {limit}"):
        compressed(ids)
    with pytest.raises(ContextOverflowError, match=f"trained for {limit}"):
        compressed.generate(ids[:, :10], max_new_tokens=limit)
    if family != "gpt2":  # learned positions end there
        with torch.no_grad():
            assert compress(model, Full(), allow_extrapolation=True)(ids).logits.shape[1] == limit + 1


def test_the_probe_notices_layers_that_do_not_ask(monkeypatch):
    """A model whose attention bypasses the interface is refused, not silently left uncompressed."""
    model = tiny_lm("llama")
    bypassed = model.model.layers[1].self_attn
    monkeypatch.setattr(bypassed, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(UnsupportedError, match="2 of 3 layers"):
        backbone_of(model)
    assert backbones.SUPPORTED_MODELS

"""Every supported architecture: its own logits when nothing is compressed, and nothing left behind."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    Qwen3NextConfig,
    Starcoder2Config,
)

from lms import (
    CONFIGS,
    SHAPED_SCORES,
    TINY_METHODS,
    VOCAB,
    longest_rows,
    random_ids,
    step_by_step,
    tiny_compressed,
    tiny_lm,
)
from thoughtformer import compress
from thoughtformer.compression import ByteBudget, Combiner, Full, Local, Sentinel
from thoughtformer.errors import ConfigError, ContextOverflowError, UnsupportedError
from thoughtformer.models.acceptance import TESTED_MODELS
from thoughtformer.models.backbone import backbone_of
from thoughtformer.models.transformers_api import CACHE_NAME


def test_every_supported_architecture_is_tested():
    assert set(CONFIGS) == set(TESTED_MODELS)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*CONFIGS, "plain"])
def test_nothing_compressed_is_the_base_bit_for_bit(family, backend):
    """Read at once, prefilled and step by step: the very same operations, but where a window needs a mask."""
    model = tiny_lm(family, backend=backend)
    # Eager attention rounds its softmax to float32.
    equal = partial(torch.allclose, atol=1e-5) if getattr(model.config, "sliding_window", None) else torch.equal
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        first = model(ids[:, :15], use_cache=True)
        stepped = [first.logits]
        for column in range(15, 20):
            stepped.append(model(ids[:, [column]], use_cache=True, **{CACHE_NAME: first[CACHE_NAME]}).logits)
        with compress(model, Local(removed=0.0)) as compressed:
            assert equal(compressed(ids, use_cache=False).logits, expected)
            cache = compressed.new_cache(2)
            ours = [compressed(ids[:, :15], cache=cache).logits]
            ours += [compressed(ids[:, [column]], cache=cache).logits for column in range(15, 20)]
        assert equal(torch.cat(ours, dim=1), torch.cat(stepped, dim=1))
        assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", [*CONFIGS, "plain"])
def test_nothing_is_left_behind(family):
    """After the `with`: the same modules, parameters, configuration and logits, sentinels and LoRA or not."""
    model = tiny_lm(family)
    ids = random_ids(2, 40)
    names, config = [name for name, _ in model.named_parameters()], copy.deepcopy(model.config.to_dict())
    backend = model.config._attn_implementation
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
    assert model.config._attn_implementation == backend


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


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
REFUSED = {
    "alibi": (
        lambda: BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2),
        "can't be run with its attention",
    ),
    "chunks": (lambda: Llama4TextConfig(**SMALL, head_dim=8), "chunked_attention"),
    "linear": (lambda: Qwen3NextConfig(**SMALL, head_dim=8, num_experts=4), "linear_attention"),
    "both_ways": (lambda: Gemma3TextConfig(**SMALL, head_dim=8, use_bidirectional_attention=True), "bidirectional"),
    "growing_rotation": (
        lambda: LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "dynamic",
    ),
    "some_sinks": (lambda: LlamaConfig(**SMALL, num_sink_tokens=4), "num_sink_tokens=4"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_would_not_be_exact_is_refused_by_name(case):
    config, message = REFUSED[case]
    backend = "eager" if case == "alibi" else "sdpa"
    model = AutoModelForCausalLM.from_config(config(), attn_implementation=backend).eval()
    with pytest.raises(UnsupportedError, match=message):
        compress(model, "full")


def test_a_model_that_does_more_than_it_says_fails_its_proof():
    """Where it differs, and by how much; a view is refused, and the model is as it was."""
    model = tiny_lm("llama")
    ids = random_ids(1, 10)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 2)  # seen on both sides
    expected = model(ids).logits
    compress(model, "full").close()
    forward = model.forward
    model.forward = lambda *args, **kwargs: _doubled(forward(*args, **kwargs))
    with pytest.raises(UnsupportedError, match=r"of 64 tokens, the logits of number \d+ differ by 0\.5"):
        compress(copy.copy(model), "full")
    model.forward = forward
    assert torch.equal(model(ids).logits, expected)


def _doubled(output):
    output.logits = output.logits * 2
    return output


def test_an_architecture_that_no_test_covers_runs_with_one_warning():
    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(Starcoder2Config(**SMALL, **settings, sliding_window=None)).double().eval()
    ids = random_ids(1, 30)
    with pytest.warns(UserWarning, match="starcoder2.* is not among"):
        compressed = compress(model, "full")
    with torch.no_grad():
        assert torch.allclose(compressed(ids).logits, model(ids).logits)
    compress(model, "local")  # an error here, if it were said again


@torch.no_grad()
def test_a_window_as_wide_as_the_text_is_none():
    """Mistral's default: every layer has one. Up to its width nothing differs; longer texts are refused in words."""
    model = tiny_lm("mistral", sliding_window=64)
    ids = random_ids(1, 64)
    compressed = compress(model, "full", allow_extrapolation=True)
    assert torch.allclose(compressed(ids, use_cache=False).logits, model(ids).logits)
    streaming = compress(model, "streaming", max_entries=20)
    cache = streaming.new_cache(1)
    streaming(ids, cache=cache)
    assert int(cache.num_entries[0]) < 20
    for view in (compressed, streaming):
        with pytest.raises(
            ContextOverflowError,
            match="65 tokens, but layers of MistralForCausalLM that methods act on read a window of 64",
        ):
            view(random_ids(1, 65))


def test_a_window_taken_for_none_never_begins_to_act():
    """Wider than any text of the trained length, in some layers: an extrapolated text would come to its end."""
    model = tiny_lm("qwen2", sliding_window=200, layer_types=["sliding_attention", "full_attention", "full_attention"])
    compressed = compress(model, "full", allow_extrapolation=True)
    assert [group.window for group in compressed.groups] == [None]
    with pytest.raises(ContextOverflowError, match="read a window of 200"):
        compressed(random_ids(1, 201))


def test_an_unproven_model_is_not_taken_in_training():
    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(Starcoder2Config(**SMALL, **settings, sliding_window=None)).train()
    with pytest.raises(UnsupportedError, match=r"call model\.eval\(\)"):
        compress(model, "full")


def test_rotations_that_are_not_understood_are_refused_where_they_matter():
    """Half of these layers turn nothing: what streaming would turn its queries by is no rotation of theirs."""
    model = tiny_lm("smollm3", no_rope_layers=[1, 0, 1])
    compress(model, "local")
    with pytest.raises(UnsupportedError, match="turns queries in a way that isn't understood"):
        compress(model, "streaming")


@pytest.mark.parametrize("family", SHAPED_SCORES)
@torch.no_grad()
def test_caps_and_sinks_are_applied_or_refused(family, monkeypatch):
    """By the model's own attention; what computes scores of its own is refused by name."""
    # Eager attention rounds its softmax to float32.
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: scores.softmax(dim))
    model, ids = tiny_lm(family), random_ids(2, 50)
    base = model(ids).logits
    for case, method in TINY_METHODS.items():
        if method.computes_scores:
            with pytest.raises(UnsupportedError, match="computes scores of its own"):
                tiny_compressed(model, method)
            continue
        with tiny_compressed(model, method) as compressed:
            at_once = compressed(ids, use_cache=False).logits
            cache = compressed.new_cache(2)
            torch.testing.assert_close(step_by_step(compressed, ids, cache), at_once, rtol=0, atol=1e-9, msg=case)
            assert cache.num_bytes() == compressed.cache_bytes(longest_rows(cache), 2)
            assert method.name == "full" or (at_once - base).abs().max() > 1e-3
    with pytest.raises(UnsupportedError, match="FlexAttention"):
        compress(model, "local", execution="flex")


@torch.no_grad()
def test_a_budget_of_bytes_counts_the_windows():
    model = tiny_lm("gemma3_text")
    view = backbone_of(model)
    in_window, full = view.kv_shape(range(2)).entry_bytes, view.kv_shape(range(1)).entry_bytes
    policy = {"span_tokens": 5, "first_tokens": 2, "recent_tokens": 3, "start_tokens": 0}
    most = 11 * in_window + 30 * full
    compressed = compress(model, Combiner(policy=ByteBudget(max_bytes=most, **policy)))
    cache, largest = compressed.new_cache(1), 0
    for column in random_ids(1, 90).unbind(1):
        compressed(column[:, None], cache=cache)
        entries = longest_rows(cache)
        largest = max(largest, entries[0] * full + entries[1] * in_window)
    assert most - 5 * full <= largest <= most
    # What waits for sentinels is in windows as well.
    most = 11 * in_window + 40 * (full + in_window)
    sentinels = tiny_compressed(model, Sentinel(policy=ByteBudget(max_bytes=most, **policy)))
    cache = sentinels.new_cache(1)
    for column in random_ids(1, 70).unbind(1):
        sentinels(column[:, None], cache=cache)
        entries = longest_rows(cache)
        assert entries[0] * full + entries[1] * in_window <= most
    with pytest.raises(ConfigError, match=f"beside {11 * in_window} bytes of layers with a window"):
        compress(model, Combiner(policy=ByteBudget(max_bytes=11 * in_window + 9 * full, **policy)))


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

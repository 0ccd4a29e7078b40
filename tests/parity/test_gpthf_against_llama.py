"""The plain GPT is a Llama: transformers' own model with the same weights gives the same logits."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import random_text, tiny_model
from thoughtformer.models import GPTHFForCausalLM


def as_llama(model: GPTHFForCausalLM) -> LlamaForCausalLM:
    """transformers' Llama with this model's weights."""
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_body_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    state = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
        "lm_head.weight": model.lm_head.weight,
        "model.norm.weight": model.model.norm.weight,
    }
    for number, layer in enumerate(model.model.stages[0].layers):
        query, key, value = layer.attention.qkv_proj.weight.split(sizes)
        gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
        own = {
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": layer.attention.o_proj.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.down_proj.weight,
            "input_layernorm": layer.attention_norm.weight,
            "post_attention_layernorm": layer.mlp_norm.weight,
        }
        state |= {f"model.layers.{number}.{name}.weight": weight for name, weight in own.items()}
    llama.load_state_dict(state)
    return llama.double().eval()


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["plain_heads", "grouped_heads"])
def test_logits_equal_llama(kv_heads):
    model = tiny_model(
        "causal", num_encoder_layers=0, num_body_layers=3, num_key_value_heads=kv_heads, sentence_end_token_id=None
    )
    text = random_text(60, seed=1)[None]
    with torch.no_grad():
        ours, theirs = model(text).logits, as_llama(model)(text).logits
    # transformers computes rotations in float32.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))

"""The plain GPT as a GGUF file for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from thoughtformer.convert.llama import layer_weights, plain_layers, plain_tokenizer
from thoughtformer.errors import UnsupportedError
from thoughtformer.files import new_file
from thoughtformer.models.gpthf.causal_lm import GPTHFForCausalLM
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["write_gguf"]

#: tokenizers' type of an ordinary token and of a special one, in GGUF.
GGUF_NORMAL, GGUF_CONTROL = 1, 3


def write_gguf(model: GPTHFForCausalLM, tokenizer: SentenceTokenizer, path: str | Path) -> None:
    """Writes a GGUF file in float32 with its tokenizer, whole or not at all. Needs the `bench` extra (gguf).

    Raises:
        UnsupportedError: a model that folds its context, a tokenizer that writes sentence ends, or no gguf installed.
        OutputError: the file exists, or can't be written.
    """
    layers, config, path = plain_layers(model), model.config, Path(path)
    try:
        import gguf
    except ImportError:
        raise UnsupportedError('writing GGUF needs the package gguf: pip install "thoughtformer[bench]".') from None
    with new_file(path) as draft:
        writer = gguf.GGUFWriter(draft, "llama")
        _describe(writer, config, tokenizer)
        names = {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        writer.add_tensor("token_embd.weight", _array(model.lm_head.weight))
        writer.add_tensor("output_norm.weight", _array(model.model.norm.weight))
        for number, layer in enumerate(layers):
            for name, weight in layer_weights(model, layer).items():
                if name in ("self_attn.q_proj", "self_attn.k_proj"):
                    weight = _neighbours(weight, config.head_dim)
                writer.add_tensor(f"blk.{number}.{names[name]}.weight", _array(weight))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _array(weight: Any) -> np.ndarray:
    return weight.detach().float().contiguous().cpu().numpy()


def _neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Rotary pairs are half a head apart here, side by side in llama.cpp."""
    rows, width = weight.shape
    return weight.reshape(rows // head_dim, 2, head_dim // 2, width).transpose(1, 2).reshape(rows, width)


def _describe(writer: Any, config: Any, tokenizer: SentenceTokenizer) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_body_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)

    backend = json.loads(plain_tokenizer(tokenizer).backend_tokenizer.to_str())
    special = {token["id"] for token in backend["added_tokens"]}
    tokens = {**backend["model"]["vocab"], **{token["content"]: token["id"] for token in backend["added_tokens"]}}
    by_id = {number: token for token, number in tokens.items()}
    # Ids that the model has room for and the tokenizer doesn't know must have names of their own.
    names = [by_id.get(number, f"<|unused{number}|>") for number in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(
        [GGUF_CONTROL if number in special or number not in by_id else GGUF_NORMAL for number in range(len(names))]
    )
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.bos_token_id)
        writer.add_add_bos_token(True)

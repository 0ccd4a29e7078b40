"""The plain GPT in other programs: as a Llama of transformers, and as a GGUF file for llama.cpp.

A plain GPT without encoder is a Llama, so both exports are exact; a model that folds its context has no counterpart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thoughtformer.errors import UnsupportedError
from thoughtformer.models.causal_lm import GPTHFForCausalLM
from thoughtformer.models.layers import Layer
from thoughtformer.models.writing import new_file, new_folder
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["as_llama", "export_llama", "plain_tokenizer", "write_gguf"]

#: tokenizers' type of an ordinary token and of a special one, in GGUF.
GGUF_NORMAL, GGUF_CONTROL = 1, 3


def _plain_layers(model: GPTHFForCausalLM) -> list[Layer]:
    config = model.config
    if config.num_encoder_layers or config.body_visibility != "causal":
        raise UnsupportedError(
            f"only a plain GPT is a Llama; this model has {config.num_encoder_layers} encoder layers and a "
            f"{config.body_visibility!r} body, which no other program knows."
        )
    return cast(list[Layer], list(model.model._stage_list()[0].layers))


def _layer_weights(model: GPTHFForCausalLM, layer: Layer) -> dict[str, Tensor]:
    """One layer's weights under transformers' names, as views of the model's own."""
    config = model.config
    sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    query, key, value = layer.attention.qkv_proj.weight.detach().split(sizes)
    gate, up = layer.mlp.gate_up_proj.weight.detach().chunk(2)
    return {
        "input_layernorm": layer.attention_norm.weight.detach(),
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": value,
        "self_attn.o_proj": layer.attention.o_proj.weight.detach(),
        "post_attention_layernorm": layer.mlp_norm.weight.detach(),
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": layer.mlp.down_proj.weight.detach(),
    }


def as_llama(model: GPTHFForCausalLM) -> LlamaForCausalLM:
    """transformers' Llama on this plain GPT's very weights: both share their memory.

    Raises:
        UnsupportedError: a model with an encoder, or whose body isn't causal.
    """
    layers, config = _plain_layers(model), model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_body_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )
    llama.to(dtype=model.dtype)  # type: ignore[call-arg]  transformers wraps Module.to without its types
    state = {
        "model.embed_tokens.weight": model.lm_head.weight.detach(),
        "model.norm.weight": model.model.norm.weight.detach(),
        "lm_head.weight": model.lm_head.weight.detach(),
    }
    for number, layer in enumerate(layers):
        own = _layer_weights(model, layer)
        state |= {f"model.layers.{number}.{name}.weight": weight for name, weight in own.items()}
    llama.load_state_dict(state, assign=True)
    llama.tie_weights()
    return llama.eval()


def export_llama(model: GPTHFForCausalLM, tokenizer: SentenceTokenizer, out: str | Path) -> None:
    """Writes a folder that transformers, vLLM and others load as a Llama; whole or not at all.

    Raises:
        UnsupportedError: a model that folds its context.
        OutputError: the folder exists, or can't be written.
    """
    llama = as_llama(model)
    with new_folder(Path(out)) as draft:
        # Views of one storage can't be written: each weight gets memory of its own.
        llama.save_pretrained(draft, state_dict={name: part.clone() for name, part in llama.state_dict().items()})
        plain_tokenizer(tokenizer).save_pretrained(str(draft))


def plain_tokenizer(tokenizer: SentenceTokenizer) -> PreTrainedTokenizerFast:
    """The same ids from a tokenizer that needs no code of this package.

    Raises:
        UnsupportedError: a tokenizer that closes sentences, which only this package's code can.
    """
    if tokenizer.insert_sentence_ends:
        raise UnsupportedError(
            "the tokenizer writes sentence ends, which no other program would: the model would read text unlike "
            "its training's. Export a model trained without them, such as tiny-gpt."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    start = str(tokenizer.bos_token)
    backend.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, backend.token_to_id(start))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=start,
        eos_token=str(tokenizer.eos_token),
        pad_token=str(tokenizer.pad_token),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def write_gguf(model: GPTHFForCausalLM, tokenizer: SentenceTokenizer, path: str | Path) -> None:
    """Writes a GGUF file in float32 with its tokenizer, whole or not at all. Needs the `bench` extra (gguf).

    Raises:
        UnsupportedError: a model that folds its context, a tokenizer that writes sentence ends, or no gguf installed.
        OutputError: the file exists, or can't be written.
    """
    layers, config, path = _plain_layers(model), model.config, Path(path)
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
            for name, weight in _layer_weights(model, layer).items():
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

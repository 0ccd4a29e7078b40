"""The plain GPT as a Llama of transformers, which it is; a model that folds its context has no counterpart."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thoughtformer.errors import UnsupportedError
from thoughtformer.files import new_folder
from thoughtformer.models.feed_forward import SwiGLU
from thoughtformer.models.gpthf.causal_lm import GPTHFForCausalLM
from thoughtformer.models.gpthf.layers import Layer
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["as_llama", "export_llama", "layer_weights", "plain_layers", "plain_tokenizer"]


def plain_layers(model: GPTHFForCausalLM) -> list[Layer]:
    config = model.config
    if config.num_encoder_layers or config.body_visibility != "causal":
        raise UnsupportedError(
            f"only a plain GPT is a Llama; this model has {config.num_encoder_layers} encoder layers and a "
            f"{config.body_visibility!r} body, which no other program knows."
        )
    return cast(list[Layer], list(model.model._stage_list()[0].layers))


def layer_weights(model: GPTHFForCausalLM, layer: Layer) -> dict[str, Tensor]:
    """One layer's weights under transformers' names, as views of the model's own."""
    config = model.config
    sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    query, key, value = layer.attention.qkv_proj.weight.detach().split(sizes)
    mlp = cast(SwiGLU, layer.mlp)
    gate, up = mlp.gate_up_proj.weight.detach().chunk(2)
    return {
        "input_layernorm": layer.attention_norm.weight.detach(),
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": value,
        "self_attn.o_proj": layer.attention.o_proj.weight.detach(),
        "post_attention_layernorm": layer.mlp_norm.weight.detach(),
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": mlp.down_proj.weight.detach(),
    }


def as_llama(model: GPTHFForCausalLM) -> LlamaForCausalLM:
    """transformers' Llama on this plain GPT's very weights: both share their memory.

    Raises:
        UnsupportedError: a model with an encoder, or whose body isn't causal.
    """
    layers, config = plain_layers(model), model.config
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
        own = layer_weights(model, layer)
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

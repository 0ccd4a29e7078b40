"""Tiny random causal LMs of every supported family, adapters for them, and methods that do something to short texts."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

import twins
from conftest import tiny_model
from prose import tiny_pair, tiny_tokenizer
from thoughtformer.compression import METHODS, AdapterConfig, CompressedModel, Method, SentinelAdapter, compress
from thoughtformer.models.backbone import backbone_of
from thoughtformer.text import END_OF_TEXT
from twins.folding import policy

__all__ = ["policy"]

VOCAB = 40
# Three layers: what <CL> reads reaches later tokens through <CR> in the third.
_SHAPE = {"vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 200}
_LLAMA = _SHAPE | {"hidden_size": 32, "intermediate_size": 40, "num_key_value_heads": 2}

_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": _LAYERS, "sliding_window": 12}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: A configuration by family, grouped heads where the family has them.
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE, hidden_size=32, intermediate_size=40, rotary_pct=0.5),
    "phi": lambda: PhiConfig(**_SHAPE, hidden_size=32, intermediate_size=40),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=200),
    "opt": lambda: OPTConfig(**_SHAPE, hidden_size=32, ffn_dim=40, word_embed_proj_dim=16),
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    "gemma3_text": lambda: Gemma3TextConfig(**_GEMMA),
    "gpt_oss": lambda: GptOssConfig(**_LLAMA | _MOE, head_dim=8, layer_types=_LAYERS, sliding_window=12),
    "granite": lambda: GraniteConfig(
        **_LLAMA, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3
    ),
    "mixtral": lambda: MixtralConfig(**_LLAMA | _MOE),
    "olmo2": lambda: Olmo2Config(**_LLAMA),
    "phi3": lambda: Phi3Config(**_LLAMA, pad_token_id=0, sliding_window=None),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "smollm3": lambda: SmolLM3Config(**_LLAMA, pad_token_id=0),
}
#: Families that differ in what a compressed model must get right; "plain" is this package's GPT.
DIFFERENT = ("plain", "llama", "gpt_neox", "gpt2", "opt", "gemma3_text")


def in_turn(
    cases: Iterable[str], families: Sequence[str] = DIFFERENT, *, always: Sequence[str] = ("gemma3_text",)
) -> list[tuple[str, str]]:
    """Each case with the families of `always` and with one of the others, which take turns; with EVERY_PAIR=1 with all.

    What a family and a method do together they do through few hooks: each of both sides meets several of the other.
    """
    if os.environ.get("EVERY_PAIR") == "1":
        return [(case, family) for case in cases for family in families]
    others = [family for family in families if family not in always]
    return [(case, family) for number, case in enumerate(cases) for family in (*always, others[number % len(others)])]


#: Those whose scores only their own attention computes right: caps and sinks, without torch's fast attention.
SHAPED_SCORES = ("gemma2", "gpt_oss")


def tiny_lm(
    family: str = "llama", *, backend: str = "sdpa", dtype: torch.dtype = torch.float64, **changes: Any
) -> PreTrainedModel:
    """A random model whose attention is far from uniform, so that a wrong mask shows; with `changes` of its shape."""
    if family == "plain":
        settings = {"num_encoder_layers": 0, "num_body_layers": 3, "num_key_value_heads": 2}
        return tiny_model(
            "causal", hidden_size=32, sentence_end_token_id=None, bos_token_id=None, eos_token_id=None, **settings
        ).to(dtype)
    config = CONFIGS[family]()
    if family in SHAPED_SCORES:
        backend = "eager"
    for name, value in changes.items():
        setattr(config, name, value)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    # Grouped products of experts know no float64.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=backend).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.copy_(noise * 0.1 + is_norm if parameter.dim() == 1 else noise * 0.4)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tiny_adapter(model: PreTrainedModel, **settings: Any) -> SentinelAdapter:
    """A random adapter, put into the model; its LoRA is no zero."""
    settings = {"lora_rank": 2, "lora_alpha": 4.0, "lora_layers": "all"} | settings
    adapter = SentinelAdapter(backbone_of(model), AdapterConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trainable():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.4).to(model.dtype)
            parameter.requires_grad_(False)
    return adapter


#: Every method by names for the tests; those without a twin by their defaults, which tests/contract takes exception to.
TINY_METHODS: dict[str, Method] = {
    case: method
    for name, kind in METHODS.items()
    for case, method in (twins.METHODS[name].cases if name in twins.METHODS else {name: kind()}).items()
}
#: One setting of each method, and all of sentinels; the others run on the families that differ most.
FIRST_SETTINGS = {next(case for case, each in TINY_METHODS.items() if each.name == name) for name in METHODS}
FIRST_SETTINGS |= {case for case, each in TINY_METHODS.items() if each.name == "sentinel"}
#: Models for the engine: a family, and a method.
SERVED: dict[str, tuple[str, Method]] = {
    case: served for twin in twins.METHODS.values() for case, served in twin.served.items()
}


def tiny_compressed(model: PreTrainedModel, method: Method, **settings: Any) -> CompressedModel:
    """The model under a method, with a random adapter where one is needed."""
    adapter = None
    if method.needs_adapter:
        adapter = tiny_adapter(model, **{name: getattr(method, name) for name in method.trained_settings})
    return compress(model, method, adapter=adapter, **settings)


def served_pair(kind: str) -> tuple[CompressedModel, Any]:
    """A compressed model that texts can be given to, by what it is and does; see `SERVED`."""
    return compressed_pair(*SERVED[kind])


def compressed_pair(family: str, method: Method) -> tuple[CompressedModel, Any]:
    """A model of the family under the method, and a tokenizer."""
    if family == "plain":
        model, tokenizer = tiny_pair(plain=True)
        return tiny_compressed(model, method), tokenizer
    backend = tiny_tokenizer(False).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(backend), eos_token=END_OF_TEXT)
    model = tiny_lm(family, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return tiny_compressed(model, method), tokenizer


def longest_rows(cache: Any) -> list[int]:
    """Entries of the longest row, in each group of layers; for `cache_bytes`."""
    return [int(lengths.max()) for lengths in cache.store.lengths_by_part()]


def random_ids(rows: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Ids without special ones."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def step_by_step(compressed: CompressedModel, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """Logits of a text read one token at a time."""
    cache = compressed.new_cache(len(ids)) if cache is None else cache
    steps = [compressed(ids[:, [column]], cache=cache).logits for column in range(ids.shape[1])]
    return torch.cat(steps, dim=1)

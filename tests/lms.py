"""Tiny random causal LMs of every supported family, adapters for them, and methods that do something to short texts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from conftest import tiny_model
from prose import tiny_pair, tiny_tokenizer
from thoughtformer.compression import (
    AdapterConfig,
    Combiner,
    CompressedModel,
    EntryBudget,
    Full,
    HeavyHitters,
    Local,
    Method,
    Policy,
    RandomEviction,
    RemovedFraction,
    Scattered,
    SentenceEnds,
    Sentinel,
    SentinelAdapter,
    StreamingLLM,
    Truncation,
    compress,
)
from thoughtformer.models.backbone import backbone_of
from thoughtformer.text import END_OF_TEXT

VOCAB = 40
# Three layers: what <CL> reads reaches later tokens through <CR> in the third.
_SHAPE = {"vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 200}
_LLAMA = _SHAPE | {"hidden_size": 32, "intermediate_size": 40, "num_key_value_heads": 2}

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
}
#: Families that differ in what a compressed model must get right; "plain" is this package's GPT.
DIFFERENT = ("plain", "llama", "gpt_neox", "gpt2", "opt")


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
    for name, value in changes.items():
        setattr(config, name, value)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
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


def policy(**settings: Any) -> Policy:
    """Folds spans of 5 tokens soon."""
    defaults = {"removed": 0.6, "span_tokens": 5, "first_tokens": 2, "recent_tokens": 3, "start_tokens": 8}
    return RemovedFraction(**(defaults | settings))


#: Every method by a name for the tests.
TINY_METHODS: dict[str, Method] = {
    "full": Full(),
    "truncation": Truncation(piece_tokens=13),
    "local": Local(removed=0.6),
    "scattered": Scattered(removed=0.6),
    "random": RandomEviction(max_entries=15, first_tokens=2, recent_tokens=4),
    "streaming": StreamingLLM(max_entries=14, first_tokens=3),
    "h2o": HeavyHitters(max_entries=14),
    "combiner": Combiner(policy=policy()),
    "sentinel": Sentinel(policy=policy()),
    "sentinel_k4": Sentinel(policy=policy(span_tokens=9), num_sentinels=4),
    "sentinel_earlier": Sentinel(policy=policy(), num_sentinels=2, see_earlier=True),
    "sentinel_lag0": Sentinel(policy=policy(removed=0.9, recent_tokens=0, first_tokens=0, start_tokens=0)),
    "sentinel_lag16": Sentinel(policy=policy(removed=0.9, recent_tokens=16)),
}


def tiny_compressed(model: PreTrainedModel, method: Method, **settings: Any) -> CompressedModel:
    """The model under a method, with a random adapter where one is needed."""
    adapter = None
    if isinstance(method, Sentinel):
        adapter = tiny_adapter(model, num_sentinels=method.num_sentinels, see_earlier=method.see_earlier)
    return compress(model, method, adapter=adapter, **settings)


def served_pair(kind: str) -> tuple[CompressedModel, Any]:
    """A compressed model that texts can be given to, by what it is and does; see `SERVED`."""
    family, method = SERVED[kind]
    if family == "plain":
        model, tokenizer = tiny_pair(plain=True)
        return tiny_compressed(model, method), tokenizer
    backend = tiny_tokenizer(False).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(backend), eos_token=END_OF_TEXT)
    model = tiny_lm(family, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return tiny_compressed(model, method), tokenizer


_SENTENCES = SentenceEnds(end_ids=frozenset(range(5, 40)), recent_tokens=3, start_tokens=9)
#: Models for the engine: a family, and a method.
SERVED: dict[str, tuple[str, Method]] = {
    "sentinel_plain": ("plain", Sentinel(policy=policy())),
    "sentinel_sentences": ("llama", Sentinel(policy=_SENTENCES, num_sentinels=2)),
    "sentinel_budget": ("gpt2", Sentinel(policy=EntryBudget(max_entries=250, span_tokens=7, recent_tokens=3))),
    "streaming": ("llama", StreamingLLM(max_entries=40, first_tokens=3)),
    "random": ("gpt_neox", RandomEviction(max_entries=40, first_tokens=2, recent_tokens=4)),
    "combiner": ("qwen3", Combiner(policy=policy())),
}


def random_ids(rows: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Ids without special ones."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def step_by_step(compressed: CompressedModel, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """Logits of a text read one token at a time."""
    cache = compressed.new_cache(len(ids)) if cache is None else cache
    steps = [compressed(ids[:, [column]], past_key_values=cache).logits for column in range(ids.shape[1])]
    return torch.cat(steps, dim=1)

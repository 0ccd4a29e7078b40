"""The models that speed and memory are measured on: random weights, which cost what trained ones cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from thoughtformer.errors import ConfigError, nearest
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
from thoughtformer.models.loading import load_tokenizer
from thoughtformer.text import SentenceTokenizer

__all__ = ["DEEP", "SIZES", "Size", "size_named"]

SENTENCE_TOKENS = 25


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's shape, and workloads that fit it.

    Attributes:
        splits: encoder + body layers of the GPTHFs compared with the plain GPT of as many layers.
        contexts: prompt lengths of the prefill curve.
        decode_contexts: contexts held while a batch decodes.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    splits: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    decode_batch: int
    engine_context: int
    longest_prompt: int
    vocab_size: int = 8192  # the bundled tokenizer's, so that every peer can write text

    def gpt(self) -> GPTHFForCausalLM:
        """The plain GPT."""
        return self._model(0, self.layers, "causal")

    def gpthf(self, split: tuple[int, ...], visibility: str = "hybrid", **changes: Any) -> GPTHFForCausalLM:
        """A GPTHF of as many parameters, by encoder and body layers, and an hourglass's decoder layers."""
        if len(split) == 3:
            changes |= {"num_decoder_layers": split[2]}
        return self._model(split[0], split[1], visibility, **changes)

    def tokenizer(self) -> SentenceTokenizer:
        """The bundled plain one."""
        return load_tokenizer("tiny-gpt")

    def _model(self, encoder: int, body: int, visibility: str, **changes: Any) -> GPTHFForCausalLM:
        torch.manual_seed(0)
        config = GPTHFConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_encoder_layers=encoder,
            num_body_layers=body,
            num_attention_heads=self.heads,
            body_visibility=visibility,
            max_position_embeddings=1 << 20,
            max_sentence_tokens=None,
            **changes,
        )
        return GPTHFForCausalLM(config).eval()


SIZES = {
    size.name: size
    for size in (
        Size(
            name="full",
            layers=12,
            hidden_size=768,
            intermediate_size=2048,
            heads=12,
            splits=((4, 8), (2, 10)),
            contexts=(512, 1024, 2048, 4096, 8192, 16384, 32768),
            decode_contexts=(1024, 4096, 16384),
            decode_batch=16,
            engine_context=1024,
            longest_prompt=512,
        ),
        Size(
            name="toy",
            layers=3,
            hidden_size=64,
            intermediate_size=128,
            heads=2,
            splits=((1, 2), (2, 1)),
            contexts=(64, 128),
            decode_contexts=(64, 128),
            decode_batch=3,
            engine_context=48,
            longest_prompt=64,
        ),
    )
}


#: The paper's 24 layers, for cases that name it; its vocabulary has no tokenizer here.
DEEP = replace(
    SIZES["full"], name="deep", layers=24, hidden_size=1024, intermediate_size=4096, heads=16, vocab_size=16384
)


def size_named(name: str) -> Size:
    """A size by name; raises `ConfigError`."""
    if name not in SIZES:
        raise ConfigError(f"size {name!r} is unknown.{nearest(name, SIZES)}")
    return SIZES[name]

"""The configuration of a GPTHF, and of the plain GPT as its uncompressed case."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from thoughtformer.attention.visibility import BODY_RULES
from thoughtformer.errors import ConfigError, nearest

__all__ = ["GPTHFConfig"]

BODY_POSITIONS = ("sentence", "token")


@strict
class GPTHFConfig(PreTrainedConfig):
    """Shape and rules of a Generative Pretrained Thoughtformer (arXiv 2503.11426).

    A plain GPT is `GPTHFConfig(num_encoder_layers=0, num_body_layers=12, body_visibility="causal")`.

    Args:
        vocab_size: number of token ids, special tokens included.
        hidden_size: width of every layer.
        intermediate_size: width of the SwiGLU layers; default 8/3 of `hidden_size`, rounded up to 64.
        num_encoder_layers: word-level layers, which see their own sentence only.
        num_body_layers: sentence-level layers, which see what `body_visibility` says.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; default `num_attention_heads`.
        body_visibility: `fast`, `keep_last`, `hybrid` or `causal`; see `thoughtformer.attention.visibility`.
        body_positions: what the body's rotary positions count: `sentence` or `token`. A `causal` body counts tokens.
        sentence_end_token_id: closes a sentence; None for text without sentence ends, which needs a `causal` body
            without encoder.
        max_sentence_tokens: a sentence's tokens, its end included; the last is always the end. None: no limit.
        max_position_embeddings: tokens of a document that the model was trained for; longer texts are refused.
        allow_extrapolation: take longer texts all the same.
        bos_token_id: starts every document (`<|endoftext|>`) and is a sentence of its own; also the end of
            generation. None: documents are not separated.
        rope_theta: base of the rotary frequencies.

    Raises:
        ConfigError: a value that is unknown or contradicts another.
    """

    model_type = "gpthf"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers declares it so

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_encoder_layers: int = 2
    num_body_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    body_visibility: str = "hybrid"
    body_positions: str = "token"
    sentence_end_token_id: int | None = 1
    max_sentence_tokens: int | None = 256
    max_position_embeddings: int = 1024
    allow_extrapolation: bool = False
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check()

    @property
    def num_hidden_layers(self) -> int:
        """Layers that a token passes, those of all stages."""
        return self.num_encoder_layers + self.num_body_layers

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def _check(self) -> None:
        # Not transformers' validate_architecture: that wraps every error in one of its own.
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            if (getattr(self, name) or 0) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be an even multiple of num_attention_heads="
                f"{self.num_attention_heads}: rotary positions turn pairs."
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}."
            )
        if self.num_encoder_layers < 0 or self.num_body_layers < 1:
            raise ConfigError(
                f"num_encoder_layers={self.num_encoder_layers} must be 0 or more, and num_body_layers="
                f"{self.num_body_layers} 1 or more."
            )
        if self.body_visibility not in BODY_RULES:
            raise ConfigError(
                f"body_visibility={self.body_visibility!r} is unknown.{nearest(self.body_visibility, BODY_RULES)}"
            )
        if self.body_positions not in BODY_POSITIONS:
            raise ConfigError(
                f"body_positions={self.body_positions!r} is unknown.{nearest(self.body_positions, BODY_POSITIONS)}"
            )
        if self.sentence_end_token_id is None and (self.num_encoder_layers or self.body_visibility != "causal"):
            raise ConfigError(
                "sentence_end_token_id=None leaves the text without sentences, but num_encoder_layers="
                f"{self.num_encoder_layers} and body_visibility={self.body_visibility!r} need them. Give the id, "
                "or set num_encoder_layers=0 and body_visibility='causal'."
            )
        if self.max_sentence_tokens is not None and self.max_sentence_tokens < 2:
            raise ConfigError(
                f"max_sentence_tokens={self.max_sentence_tokens} leaves no room for a token and the sentence end: "
                "give 2 or more, or None for no limit."
            )
        for name in ("sentence_end_token_id", "bos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(f"{name}={token} is outside the vocabulary of {self.vocab_size} ids.")

"""The configuration of a GPTHF, of its hourglass, and of the plain GPT as the uncompressed case."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from thoughtformer.checks import check_type
from thoughtformer.errors import ConfigError, nearest
from thoughtformer.hub import MODEL_AUTO_MAP, write_hub_file
from thoughtformer.rules import BodyRule, body_rule

__all__ = ["KEY_TYPES", "GPTHFConfig", "LayerShape"]

BODY_POSITIONS = ("sentence", "token")
MEMORY_POSITIONS = ("sentence", "none")


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Widths of one stage's layers."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float


@strict
class GPTHFConfig(PreTrainedConfig):
    """Shape and rules of a Generative Pretrained Thoughtformer (arXiv 2503.11426).

    A plain GPT is `GPTHFConfig(num_encoder_layers=0, num_body_layers=12, body_visibility="causal")`; with decoder
    layers it is an hourglass, whose body runs once a sentence. What is said of a decoder needs one.

    Args:
        vocab_size: number of token ids, special tokens included.
        hidden_size: width of every layer.
        intermediate_size: width of the SwiGLU layers; default 8/3 of `hidden_size`, rounded up to 64.
        num_encoder_layers: word-level layers, which see their own sentence only.
        num_body_layers: sentence-level layers, which see what `body_visibility` says.
        num_decoder_layers: word-level layers after the body, which see their own sentence, and the body's outputs of
            earlier ones as further keys and values. Tokens then pass encoder and decoder, sentence ends the body; that
            needs an encoder and `body_visibility="fast"`.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; default `num_attention_heads`.
        body_visibility: `fast`, `keep_last`, `hybrid` or `causal`; see `thoughtformer.rules`.
        body_visibility_settings: what the body's rule takes beside `recent_sentences`, by name.
        body_positions: what the body's rotary positions count: `sentence` or `token`. A `causal` body counts tokens.
        recent_sentences: whole earlier sentences whose tokens stay readable, in the decoder, or in a `keep_last` or
            `hybrid` body.
        summaries_per_sentence: body positions of a sentence: its end, and so many less one learned positions after it,
            all read by the encoder. More than 1 needs a decoder.
        memory_positions: what the rotation between a decoder's token and a summary counts: `sentence` or `none`.
        ends_read_own_summary: a decoder's sentence end reads its own sentence's summary too, not only earlier ones.
        body_hidden_size: width of the body, with a linear layer before and after it; default `hidden_size`.
        body_intermediate_size: of the body's SwiGLU layers; default in proportion.
        body_reads_depths: the body reads the outputs of all encoder layers, weighted by learned gains.
        decoder_reads_depths: so do the summaries that the decoder reads, beside the body's output.
        rebuild_loss_weight: in training, of the cross-entropy of a sentence's tokens, in any order, given its vector.
        next_sentence_loss_weight: in training, of one less the cosine between the next sentence's vector and what the
            body predicts for it.
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
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  transformers declares it so

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_encoder_layers: int = 2
    num_body_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    body_visibility: str = "hybrid"
    body_visibility_settings: dict[str, Any] | None = None
    body_positions: str = "token"
    num_decoder_layers: int = 0
    recent_sentences: int = 0
    summaries_per_sentence: int = 1
    memory_positions: str = "sentence"
    ends_read_own_summary: bool = False
    body_hidden_size: int | None = None
    body_intermediate_size: int | None = None
    body_reads_depths: bool = False
    decoder_reads_depths: bool = False
    rebuild_loss_weight: float = 0.0
    next_sentence_loss_weight: float = 0.0
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
        kwargs.pop("auto_map", None)  # of the folder, not of the model
        _check_keys(kwargs)
        for name, expected in KEY_TYPES.items():
            check_type(name, getattr(self, name), expected)
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers'; `trust_remote_code=True` then loads the folder where nobody imported this package."""
        self.auto_map = MODEL_AUTO_MAP
        try:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.auto_map
        write_hub_file(save_directory)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; keys that no GPTHF has, as of a newer transformers, are left out with a warning."""
        foreign = [key for key in config_dict if not _is_known(key) and not _misspelt(key)]
        if foreign:
            warnings.warn(f"a GPTHF has no {', '.join(sorted(foreign))}: left out of its configuration.", stacklevel=2)
            config_dict = {key: value for key, value in config_dict.items() if key not in foreign}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this source into every folder that is saved."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all stages."""
        return self.num_encoder_layers + self.num_body_layers + self.num_decoder_layers

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_sentence_losses(self) -> bool:
        """Whether training adds losses of sentence vectors."""
        return self.rebuild_loss_weight > 0 or self.next_sentence_loss_weight > 0

    def body_rule(self) -> BodyRule:
        """Who may read whom in the body."""
        # An hourglass's recent sentences are its decoder's.
        recent = 0 if self.num_decoder_layers else self.recent_sentences
        return body_rule(self.body_visibility, self.body_visibility_settings, recent_sentences=recent)

    def layer_shape(self, stage: str) -> LayerShape:
        """The widths of a stage's layers: heads are as wide everywhere, and share keys alike."""
        assert self.num_key_value_heads is not None
        assert self.intermediate_size is not None
        hidden, intermediate = self.hidden_size, self.intermediate_size
        if stage == "body" and self.body_hidden_size is not None:
            hidden = self.body_hidden_size
            in_proportion = -(-self.intermediate_size * hidden // self.hidden_size // 64) * 64
            intermediate = in_proportion
        if stage == "body" and self.body_intermediate_size is not None:
            intermediate = self.body_intermediate_size
        num_heads = hidden // self.head_dim
        return LayerShape(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_heads=num_heads,
            num_kv_heads=num_heads * self.num_key_value_heads // self.num_attention_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
        )

    def _check(self) -> None:
        # Not transformers' validate_architecture: that wraps every error in one of its own.
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            if (getattr(self, name) or 0) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more.")
        for name, is_valid, needed in (
            ("rope_theta", 0 < self.rope_theta < math.inf, "above 0"),
            ("rms_norm_eps", 0 <= self.rms_norm_eps < math.inf, "0 or more"),
            ("initializer_range", 0 <= self.initializer_range < math.inf, "0 or more"),
        ):
            if not is_valid:
                raise ConfigError(f"{name}={getattr(self, name)} must be {needed}, and finite.")
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
        rule = self.body_rule()
        if self.body_positions not in BODY_POSITIONS:
            raise ConfigError(
                f"body_positions={self.body_positions!r} is unknown.{nearest(self.body_positions, BODY_POSITIONS)}"
            )
        if self.sentence_end_token_id is None and (self.num_encoder_layers or rule.needs_sentence_ends):
            raise ConfigError(
                "sentence_end_token_id=None leaves the text without sentences, but num_encoder_layers="
                f"{self.num_encoder_layers} and body_visibility={self.body_visibility!r} need them. Give the id, "
                "or set num_encoder_layers=0 and body_visibility='causal'."
            )
        self._check_hourglass()
        if self.max_sentence_tokens is not None and self.max_sentence_tokens < 2:
            raise ConfigError(
                f"max_sentence_tokens={self.max_sentence_tokens} leaves no room for a token and the sentence end: "
                "give 2 or more, or None for no limit."
            )
        for name in ("sentence_end_token_id", "bos_token_id", "pad_token_id", "eos_token_id"):
            value = getattr(self, name)
            tokens = value if isinstance(value, list) else [value]
            if any(token is not None and not 0 <= token < self.vocab_size for token in tokens):
                raise ConfigError(f"{name}={value} is outside the vocabulary of {self.vocab_size} ids.")
        if self.bos_token_id is not None and self.bos_token_id == self.sentence_end_token_id:
            raise ConfigError(
                f"bos_token_id and sentence_end_token_id are both {self.bos_token_id}, but one starts a document and "
                "the other only closes a sentence: give different ids."
            )

    def _check_hourglass(self) -> None:
        if self.memory_positions not in MEMORY_POSITIONS:
            raise ConfigError(
                f"memory_positions={self.memory_positions!r} is unknown."
                f"{nearest(self.memory_positions, MEMORY_POSITIONS)}"
            )
        if self.num_decoder_layers < 0 or self.recent_sentences < 0 or self.summaries_per_sentence < 1:
            raise ConfigError(
                f"num_decoder_layers={self.num_decoder_layers} and recent_sentences={self.recent_sentences} must be 0 "
                f"or more, summaries_per_sentence={self.summaries_per_sentence} 1 or more."
            )
        if self.num_decoder_layers and (self.body_visibility != "fast" or not self.num_encoder_layers):
            raise ConfigError(
                f"num_decoder_layers={self.num_decoder_layers} makes an hourglass, whose body runs at sentence ends "
                f"alone: it needs body_visibility='fast', not {self.body_visibility!r}, and num_encoder_layers="
                f"{self.num_encoder_layers} to be 1 or more."
            )
        if not self.num_decoder_layers:
            self._needs_decoder(
                summaries_per_sentence=1,
                ends_read_own_summary=False,
                decoder_reads_depths=False,
                memory_positions="sentence",
            )
        if self.body_reads_depths and not self.num_encoder_layers:
            raise ConfigError("body_reads_depths=True needs num_encoder_layers of 1 or more.")
        if self.body_intermediate_size is not None and self.body_intermediate_size < 1:
            raise ConfigError(f"body_intermediate_size={self.body_intermediate_size} must be 1 or more, or None.")
        if (self.body_hidden_size or self.body_intermediate_size) and not self.num_encoder_layers:
            raise ConfigError(
                f"body_hidden_size={self.body_hidden_size} and body_intermediate_size={self.body_intermediate_size} "
                "set the body apart from an encoder, but num_encoder_layers=0: set hidden_size and intermediate_size."
            )
        width = self.body_hidden_size
        if width is not None:
            shared = self.num_attention_heads // (self.num_key_value_heads or 1) * self.head_dim
            if width < shared or width % shared:
                raise ConfigError(
                    f"body_hidden_size={width} must be a multiple of {shared}: heads are {self.head_dim} wide in every "
                    "stage, and share keys alike."
                )
        for name in ("rebuild_loss_weight", "next_sentence_loss_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more.")
            if getattr(self, name) and not self.num_encoder_layers:
                raise ConfigError(
                    f"{name}={getattr(self, name)} needs an encoder, which makes vectors of sentences: "
                    "num_encoder_layers of 1 or more."
                )

    def _needs_decoder(self, **defaults: object) -> None:
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise ConfigError(f"{name}={getattr(self, name)!r} needs a decoder: num_decoder_layers of 1 or more.")


#: What each key must be. transformers checks types too, but not where annotations are kept as text, as here.
KEY_TYPES = typing.get_type_hints(type("_Keys", (), {"__annotations__": GPTHFConfig.__annotations__}), globals())

#: Keys of other configurations that follow from ours.
_DERIVED = {"head_dim": "hidden_size / num_attention_heads", "num_hidden_layers": "the layers of all stages"}


#: Keys that transformers writes, reads or hands on for every configuration, beside the fields that all have.
_SHARED_KEYS = frozenset(
    [
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "dtype",
        "experts_implementation",
        "id2label",
        "label2id",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_return_dict",
    ]
) | frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))


def _is_known(key: str) -> bool:
    return key.startswith("_") or key in KEY_TYPES or key in _SHARED_KEYS or key in _generation_keys()


@cache
def _generation_keys() -> frozenset[str]:
    """Settings of generation, which transformers takes out of a configuration."""
    return frozenset(GenerationConfig._get_default_generation_params())


def _misspelt(key: str) -> str | None:
    """The key of ours that this one looks like."""
    return next(iter(difflib.get_close_matches(key, KEY_TYPES, n=1, cutoff=0.9)), None)


def _check_keys(unknown: Mapping[str, Any]) -> None:
    """Refuses keys that would be taken along without effect; transformers takes any."""
    for key in unknown:
        if key in _DERIVED:
            raise ConfigError(f"{key}={unknown[key]!r} can't be set, it is {_DERIVED[key]}: leave it out.")
        if not _is_known(key):
            close = _misspelt(key)
            hint = f" Did you mean {close!r}?" if close else " Leave it out: it would have no effect."
            raise ConfigError(f"unknown key {key!r}.{hint}")

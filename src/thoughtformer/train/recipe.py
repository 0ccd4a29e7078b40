"""A recipe: everything that a training run depends on, but for the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from thoughtformer.errors import ConfigError
from thoughtformer.models import GPTHFConfig
from thoughtformer.models.gpthf.configuration import KEY_TYPES
from thoughtformer.rules import BODY_RULES
from thoughtformer.text.tokenizer import check_sentence_lengths
from thoughtformer.train.settings import RunSettings

__all__ = ["ModelShape", "Recipe"]


#: What the tokenizer or the run decides, and what no recipe changes.
_NOT_CHOSEN = (
    "allow_extrapolation",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "rms_norm_eps",
    "sentence_end_token_id",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
_Shape: Any = dataclasses.make_dataclass(
    "_Shape",
    [
        (name, kind, field(default=getattr(GPTHFConfig, name)))
        for name, kind in KEY_TYPES.items()
        if name not in _NOT_CHOSEN
    ],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class ModelShape(_Shape):
    """The part of `GPTHFConfig` that a recipe chooses, by its names and defaults."""


@dataclass(frozen=True, kw_only=True)
class Recipe(RunSettings):
    """A complete training run; beside what `RunSettings` says:

    Args:
        name: for logs and the model card.
        model: the model's shape.
        tokenizer: a folder with a tokenizer, or the name of a bundled model to take it from.
        sentence_ends: put sentence ends into the text; off for a plain GPT.
        min_sentence_tokens: join shorter sentences with what follows; as much as the model's `max_sentence_tokens`
            makes blocks of equal length. None keeps each sentence apart.
        row_tokens: tokens of a row, the context that the model is trained for.
        optimizer: `muon` (arXiv 2502.16982) for matrices with AdamW for the rest, or `adamw` for all.
        matrix_learning_rate: Muon's peak.
        beta1, beta2: AdamW's momenta.
        weight_decay: of matrices.
    """

    name: str = "custom"
    model: ModelShape = field(default_factory=ModelShape)
    tokenizer: str = "tiny-gpthf"
    sentence_ends: bool = True
    min_sentence_tokens: int | None = None
    optimizer: str = "muon"
    matrix_learning_rate: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            ("matrix_learning_rate", self.matrix_learning_rate > 0, "above 0"),
            ("beta1", 0 <= self.beta1 < 1, "at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
        )
        check_sentence_lengths(self.min_sentence_tokens, self.model.max_sentence_tokens)
        self.check_choice("optimizer", ("muon", "adamw"))
        rule = BODY_RULES.get(self.model.body_visibility)
        if not self.sentence_ends and (self.model.num_encoder_layers or (rule and rule.needs_sentence_ends)):
            raise ConfigError(
                "sentence_ends=false leaves no sentences, but the model has num_encoder_layers="
                f"{self.model.num_encoder_layers} and body_visibility={self.model.body_visibility!r}: "
                "a plain GPT has 0 and 'causal'."
            )
        # Whatever the vocabulary, a shape that can't be is met here, before any data is read.
        self.model_config(vocab_size=1 << 16, start=0, end=1, padding=2)

    def model_config(self, *, vocab_size: int, start: int, end: int, padding: int) -> GPTHFConfig:
        """The model's configuration for a tokenizer with these special ids."""
        return GPTHFConfig(
            **dataclasses.asdict(self.model),
            vocab_size=vocab_size,
            bos_token_id=start,
            eos_token_id=start,
            pad_token_id=padding,
            sentence_end_token_id=end if self.sentence_ends else None,
            max_position_embeddings=self.row_tokens,
        )

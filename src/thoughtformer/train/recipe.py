"""A recipe: everything that a training run depends on, but for the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from thoughtformer.errors import ConfigError
from thoughtformer.models import GPTHFConfig
from thoughtformer.text.tokenizer import check_sentence_lengths
from thoughtformer.train.settings import RunSettings

__all__ = ["ModelShape", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The part of `GPTHFConfig` that a recipe chooses; ids and vocabulary come from the tokenizer."""

    hidden_size: int = 256
    intermediate_size: int | None = None
    num_encoder_layers: int = 2
    num_body_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    body_visibility: str = "hybrid"
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
    max_sentence_tokens: int | None = 256
    rope_theta: float = 10000.0


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
        if not self.sentence_ends and (self.model.num_encoder_layers or self.model.body_visibility != "causal"):
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

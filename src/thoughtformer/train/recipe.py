"""A recipe: everything that a training run depends on, but for the data."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from thoughtformer.errors import ConfigError, nearest
from thoughtformer.models import GPTHFConfig

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
    max_sentence_tokens: int | None = 256
    rope_theta: float = 10000.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete training run.

    Args:
        name: for logs and the model card.
        model: the model's shape.
        tokenizer: a folder with a tokenizer, or the name of a bundled model to take it from.
        sentence_ends: put sentence ends into the text; off for a plain GPT.
        row_tokens: tokens of a row, the context that the model is trained for.
        rows_per_step: rows per optimiser step, over all processes.
        rows_per_batch: rows that one process computes at a time; the rest of a step is accumulated.
        max_bytes: text to take, in equal shares from each data source; None for all.
        epochs: passes over that text.
        max_steps: stop earlier, after so many steps; None for whole epochs.
        optimizer: `muon` (arXiv 2502.16982) for matrices with AdamW for the rest, or `adamw` for all.
        learning_rate: AdamW's peak.
        matrix_learning_rate: Muon's peak.
        beta1, beta2: AdamW's momenta.
        weight_decay: of matrices.
        warmup_fraction: of the steps, linear; a cosine to `final_fraction` of the peak follows.
        max_grad_norm: gradients are scaled down to this norm.
        precision: `bf16` (autocast), `fp32`, or `auto`: bf16 where the processor has instructions for it.
        seed: of weights and order.
        save_every_steps, log_every_steps: steps between checkpoints, and between log lines.
    """

    name: str = "custom"
    model: ModelShape = field(default_factory=ModelShape)
    tokenizer: str = "tiny-gpthf"
    sentence_ends: bool = True
    row_tokens: int = 1024
    rows_per_step: int = 4
    rows_per_batch: int = 4
    max_bytes: int | None = None
    epochs: int = 1
    max_steps: int | None = None
    optimizer: str = "muon"
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    warmup_fraction: float = 0.03
    final_fraction: float = 0.05
    max_grad_norm: float = 1.0
    precision: str = "auto"
    seed: int = 0
    save_every_steps: int = 200
    log_every_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("row_tokens", "rows_per_step", "rows_per_batch", "epochs", "save_every_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more.")
        for name in ("max_bytes", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more, or null.")
        for name, is_valid, needed in (
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("matrix_learning_rate", self.matrix_learning_rate > 0, "above 0"),
            ("beta1", 0 <= self.beta1 < 1, "at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "at least 0 and below 1"),
            ("final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
            ("seed", 0 <= self.seed < 1 << 32, "at least 0 and below 2**32"),
            ("row_tokens", self.row_tokens >= 2, "2 or more"),
        ):
            if not is_valid:
                raise ConfigError(f"{name}={getattr(self, name)} must be {needed}.")
        if self.rows_per_step % self.rows_per_batch:
            raise ConfigError(
                f"rows_per_step={self.rows_per_step} is not a multiple of rows_per_batch={self.rows_per_batch}."
            )
        for name, choices in (("optimizer", ("muon", "adamw")), ("precision", ("auto", "bf16", "fp32"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}.{nearest(str(getattr(self, name)), choices)}")
        if not self.sentence_ends and (self.model.num_encoder_layers or self.model.body_visibility != "causal"):
            raise ConfigError(
                "sentence_ends=false leaves no sentences, but the model has num_encoder_layers="
                f"{self.model.num_encoder_layers} and body_visibility={self.model.body_visibility!r}: "
                "a plain GPT has 0 and 'causal'."
            )
        # Whatever the vocabulary, a shape that can't be is met here, before any data is read.
        self.model_config(vocab_size=1 << 16, start=0, end=1, padding=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from nested plain values; unknown keys and wrong types raise `ConfigError`."""
        return _from_dict(cls, values, "")

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML or JSON file."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read {path}: {error}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is neither YAML nor JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not keys with values.")
        return cls.from_dict(values)

    def with_settings(self, settings: list[str]) -> Recipe:
        """This recipe with `key=value` settings applied; a dot leads into the model: `model.num_body_layers=5`."""
        values = self.to_dict()
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise ConfigError(f"--set {setting!r}: write key=value, e.g. --set epochs=2.")
            *path, last = key.split(".")
            place: Any = values
            for part in path:
                place = place.get(part) if isinstance(place, dict) else None
                if not isinstance(place, dict):
                    raise ConfigError(f"--set {setting!r}: no group {part!r}. Groups: model.")
            try:
                place[last] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ConfigError(f"--set {setting!r}: the value is not YAML: {error}") from None
        return self.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as `from_dict` takes them."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The recipe as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

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


def _from_dict(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    types_of = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in types_of:
            raise ConfigError(f"unknown key {prefix + str(key)!r}.{nearest(str(key), types_of)}")
        arguments[key] = _checked(prefix + key, value, types_of[key])
    return cls(**arguments)


def _checked(key: str, value: Any, expected: Any) -> Any:
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r} must hold keys with values.")
        return _from_dict(typing.cast(type, expected), value, key + ".")
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if float in options and isinstance(value, str):  # YAML reads 3e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if any(type(value) is option for option in options):
        return value
    names = " or ".join("null" if option is type(None) else option.__name__ for option in options)
    raise ConfigError(f"{key}={value!r} is a {type(value).__name__}; give {names}.")

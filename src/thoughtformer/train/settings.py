"""What every training run is set by, checked when built; nested plain values in and out."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from torch import nn

from thoughtformer.errors import ConfigError, nearest

__all__ = ["RunSettings", "TrainingPlan"]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run is going to do, told before it starts."""

    parameters: int
    trained_parameters: int
    device: str
    corpus_tokens: int
    steps: int
    tokens_per_step: int
    save_every_steps: int


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The part that all runs share.

    Args:
        row_tokens: tokens of a row of text.
        rows_per_step: rows per optimiser step, over all processes.
        rows_per_batch: rows that one process computes at a time; the rest of a step is accumulated.
        max_bytes: text to take, in equal shares from each data source; None for all.
        epochs: passes over that text.
        max_steps: stop earlier, after so many steps; None for whole epochs.
        learning_rate: AdamW's peak.
        warmup_fraction: of the steps, linear; a cosine to `final_fraction` of the peak follows.
        max_grad_norm: gradients are scaled down to this norm.
        precision: `bf16` (autocast), `fp32`, or `auto`: bf16 where the processor has instructions for it.
        seed: of weights and order.
        save_every_steps, log_every_steps: steps between checkpoints, and between log lines.
    """

    row_tokens: int = 1024
    rows_per_step: int = 4
    rows_per_batch: int = 4
    max_bytes: int | None = None
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float = 3e-3
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
        self.check(
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "at least 0 and below 1"),
            ("final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
            ("seed", 0 <= self.seed < 1 << 32, "at least 0 and below 2**32"),
            ("row_tokens", self.row_tokens >= 2, "2 or more"),
        )
        if self.rows_per_step % self.rows_per_batch:
            raise ConfigError(
                f"rows_per_step={self.rows_per_step} is not a multiple of rows_per_batch={self.rows_per_batch}."
            )
        self.check_choice("precision", ("auto", "bf16", "fp32"))

    def plan(self, model: nn.Module, *, device: str, corpus_tokens: int, num_rows: int) -> TrainingPlan:
        """What a run of `num_rows` rows an epoch comes to."""
        steps = self.max_steps if self.max_steps is not None else self.epochs * max(num_rows // self.rows_per_step, 1)
        parameters = list(model.parameters())
        return TrainingPlan(
            parameters=sum(parameter.numel() for parameter in parameters),
            trained_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            device=device,
            corpus_tokens=corpus_tokens,
            steps=steps,
            tokens_per_step=self.rows_per_step * self.row_tokens,
            save_every_steps=self.save_every_steps,
        )

    def check(self, *limits: tuple[str, bool, str]) -> None:
        """Raises `ConfigError` for the first (name, is it valid, what it must be) that isn't."""
        for name, is_valid, needed in limits:
            if not is_valid:
                raise ConfigError(f"{name}={getattr(self, name)} must be {needed}.")

    def check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Raises `ConfigError` unless the named setting is one of `choices`."""
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name}={getattr(self, name)!r}.{nearest(str(getattr(self, name)), choices)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A recipe from nested plain values; unknown keys and wrong types raise `ConfigError`."""
        return _from_dict(cls, values, "")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """A recipe from a YAML or JSON file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read {path}: {error}") from None
        values = _from_yaml(text, f"{path} is neither YAML nor JSON")
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not keys with values.")
        return cls.from_dict(values)

    def with_settings(self, settings: list[str]) -> Self:
        """This recipe with `key=value` settings applied; a dot leads into a group: `model.num_body_layers=5`."""
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
                    raise ConfigError(f"--set {setting!r}: no group {part!r}.")
            place[last] = _from_yaml(value, f"--set {setting!r}: the value is not YAML")
        return self.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as `from_dict` takes them."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The recipe as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)


def _from_yaml(text: str, complaint: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception as error:  # what is no number or no date raises what Python's own types do, from 2026-13-01 on
        raise ConfigError(f"{complaint}: {error}") from None


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
    if any(type(value) is (typing.get_origin(option) or option) for option in options):
        return value
    names = " or ".join("null" if option is type(None) else option.__name__ for option in options)
    raise ConfigError(f"{key}={value!r} is a {type(value).__name__}; give {names}.")

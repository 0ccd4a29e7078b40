"""Checks of settings: each names the setting, what was given, and what is wanted."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

from thoughtformer.errors import ConfigError

__all__ = ["check_count", "check_fields", "check_fraction", "check_type"]


def check_count(name: str, value: int, least: int) -> None:
    """Raises `ConfigError` unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}.")


def check_fraction(name: str, value: float, *, below_one: bool = True) -> None:
    """Raises `ConfigError` unless `value` is a fraction."""
    check_type(name, value, float)
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise ConfigError(f"{name}={value} must be at least 0 and {'below 1' if below_one else 'at most 1'}.")


def check_fields(settings: Any) -> None:
    """Raises `ConfigError` for a field of a dataclass that isn't of its annotation's type."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        check_type(field.name, getattr(settings, field.name), hints[field.name])


def check_type(name: str, value: object, expected: Any) -> None:
    """Raises `ConfigError` unless `value` is of the type `expected`, an annotation; an int does for a float."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if not any(_is(value, option) for option in options):
        names = " or ".join(map(_name, options))
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; give {names}.")


def _name(option: Any) -> str:
    if option is types.NoneType:
        return "None"
    if typing.get_origin(option) is Callable:
        return "a function"
    return str(option) if typing.get_args(option) else option.__name__


def _is(value: object, option: Any) -> bool:
    origin, parts = typing.get_origin(option), typing.get_args(option)
    if origin is Callable:
        return callable(value)
    if origin in (list, frozenset):
        return isinstance(value, origin) and all(_is(part, parts[0]) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(key, parts[0]) for key in value)
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return True
    return isinstance(value, option) and (option is bool or not isinstance(value, bool))

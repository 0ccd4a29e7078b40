"""Methods and policies as plain values, and back: for results, and for contexts on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import thoughtformer.compression.methods  # noqa: F401  registers them
from thoughtformer.compression.adapter import read_adapter_manifest
from thoughtformer.compression.method import METHODS, Method
from thoughtformer.compression.policies import POLICIES, Policy, RemovedFraction
from thoughtformer.errors import ConfigError, nearest
from thoughtformer.names import BUNDLED_ADAPTERS, nearest_method, resolve

__all__ = ["METHODS", "make_method", "method_from", "settings_of", "trained_with"]


def trained_with(adapter: str | Path | None, methods: Iterable[str] = METHODS) -> dict[str, Any]:
    """The settings of these methods that an adapter was trained with; a bundled one by its name.

    Raises:
        CheckpointError: it can't be read.
    """
    if adapter is None:
        return {}
    manifest = read_adapter_manifest(resolve(adapter, BUNDLED_ADAPTERS))
    names = [name for method in methods for name in METHODS[method].trained_settings]
    return {name: manifest[name] for name in names if name in manifest}


def settings_of(method: Method) -> dict[str, Any]:
    """A method's settings as plain values; its policy's kind beside the policy's own.

    A callback is named, and can't be read back.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Policy):
            return {"kind": value.name} | {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, frozenset):
            return sorted(value)
        return value if isinstance(value, int | float | str | bool | None) else repr(value)

    return {field.name: plain(getattr(method, field.name)) for field in fields(method)}


def method_from(name: str, settings: Mapping[str, Any]) -> Method:
    """The method that `settings_of` described; raises `ConfigError` for what isn't one."""
    values = _sets(METHODS.get(name), settings)
    if isinstance(values.get("policy"), Mapping):
        policy = dict(values["policy"])
        kind = policy.pop("kind", None)
        if not isinstance(kind, str) or kind not in POLICIES or not POLICIES[kind].can_save:
            raise ConfigError(f"a policy of kind {kind!r} can't be read back.{nearest(str(kind), POLICIES)}")
        try:
            values["policy"] = POLICIES[kind](**_sets(POLICIES[kind], policy))
        except TypeError as error:
            raise ConfigError(f"a policy of kind {kind!r} can't be made of {sorted(policy)}: {error}") from None
    return make_method(name, values, found=True)


def _sets(kind: type | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with lists made sets again, where fields are sets."""
    hints = {} if kind is None else get_type_hints(kind)
    return {
        name: frozenset(value) if isinstance(value, list) and _is_set(hints.get(name)) else value
        for name, value in values.items()
    }


def _is_set(hint: Any) -> bool:
    return any(get_origin(option) is frozenset for option in (hint, *get_args(hint)))


def make_method(name: str, settings: Mapping[str, Any], *, found: bool = False) -> Method:
    """The method of a name, with settings as its fields, or `removed` for any that removes a fraction.

    Args:
        name: of `METHODS`.
        settings: by name.
        found: they may hold what a model decided about.

    Raises:
        ConfigError: an unknown method, and settings that it doesn't take, or that are missing.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}.{nearest_method(name)}")
    kind = METHODS[name]
    known = [field.name for field in fields(kind) if found or field.name not in kind.found_settings]
    if "removed" in settings and "removed" not in known:
        make: Callable[..., Method] = kind.from_removed
        known = [*known, "removed", *(field.name for field in fields(RemovedFraction) if "policy" in known)]
    else:
        make = kind
    for setting in settings:
        if setting == "compression_ratio":
            raise ConfigError(
                f"{name} has no setting 'compression_ratio': what kvpress calls so, the fraction that is removed, is "
                f"removed={settings[setting]!r} here."
            )
        if setting in kind.found_settings and setting not in known:
            raise ConfigError(f"{name} finds {setting} from the model: leave it out.")
        if setting not in known:
            raise ConfigError(f"{name} has no setting {setting!r}.{nearest(setting, known)}")
    try:
        return make(**settings)
    except TypeError as error:
        raise ConfigError(f"{name} can't be made of {sorted(settings)}: {error}") from None

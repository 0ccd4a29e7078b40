"""Methods and policies as plain values, and back: for results, and for contexts on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from thoughtformer.compression.combiner import Combiner
from thoughtformer.compression.evicting import Full, Local, RandomEviction, Scattered, Truncation
from thoughtformer.compression.heavy_hitters import HeavyHitters
from thoughtformer.compression.method import Method
from thoughtformer.compression.policies import EntryBudget, EveryTokens, Policy, RemovedFraction, SentenceEnds
from thoughtformer.compression.sentinel import Sentinel
from thoughtformer.compression.streaming import StreamingLLM
from thoughtformer.errors import ConfigError, nearest

__all__ = ["METHODS", "method_from", "settings_of"]

#: Every method by name.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Full, Truncation, Local, Scattered, RandomEviction, StreamingLLM, HeavyHitters, Combiner, Sentinel)
}
POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (RemovedFraction, EveryTokens, EntryBudget, SentenceEnds)
}


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
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}.{nearest(name, METHODS)}")
    values = dict(settings)
    if isinstance(values.get("policy"), Mapping):
        policy = dict(values["policy"])
        kind = policy.pop("kind", None)
        if kind not in POLICIES:
            raise ConfigError(f"a policy of kind {kind!r} can't be read back.{nearest(str(kind), POLICIES)}")
        if "end_ids" in policy:
            policy["end_ids"] = frozenset(policy["end_ids"])
        values["policy"] = POLICIES[kind](**policy)
    try:
        return METHODS[name](**values)
    except TypeError as error:
        raise ConfigError(f"{name} can't be made of {sorted(values)}: {error}") from None

"""Where transformers' releases differ in what a model is called with, and how calls are checked.

A cache is `past_key_values` up to transformers 5.23 and `cache` from 5.24 on: in `forward`, in outputs, and in what
`generate` hands on. Our models take and return both names under every release; what comes next month raises, because
an argument that a model doesn't know is refused by name.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import TransformersKwargs

from thoughtformer.errors import ArgumentError, InputError, UnsupportedError, nearest

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "CachedOutput",
    "GenerateDecoderOnlyOutput",
    "GenerationConfig",
    "LogitsProcessorList",
    "StoppingCriteriaList",
    "name_cache_twice",
    "one_cache",
    "refuse_arguments",
    "rename_cache",
    "runs_uncompiled",
]

#: Every name that a cache goes by.
CACHE_NAMES = ("cache", "past_key_values")
#: The one that this release of transformers reads, in outputs as in calls.
CACHE_NAME = next(name for name in CACHE_NAMES if name in {f.name for f in fields(CausalLMOutputWithPast)})
#: Arguments of transformers' own list, which its parts may hand to any model.
SHARED_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"inputs_embeds", "return_dict"}

CacheKind = TypeVar("CacheKind")


def one_cache(cache: CacheKind | None, past_key_values: CacheKind | None) -> CacheKind | None:
    """The cache that was given by either name.

    Raises:
        InputError: two that aren't the same.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise InputError("cache and past_key_values are two names of one thing, but two caches were given: give one.")
    return past_key_values if cache is None else cache


def rename_cache(kwargs: dict[str, Any]) -> None:
    """Has a cache that is among `kwargs`, by whichever name, go by that of this transformers; in place."""
    given = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
    cache = one_cache(given.get("cache"), given.get("past_key_values"))
    if cache is not None:
        kwargs[CACHE_NAME] = cache


def refuse_arguments(kwargs: Mapping[str, Any], *, of: object, known: Iterable[str]) -> None:
    """Raises for arguments that a `forward` doesn't use.

    Those of transformers' own list are let pass where they are off (None or False), since its parts hand them to every
    model; where they ask for something, it is refused, not ignored.

    Args:
        kwargs: what is left of a call's arguments.
        of: the model that was called.
        known: what it takes.

    Raises:
        ArgumentError: a name that nobody knows.
        UnsupportedError: one of transformers' list, which asks for what this model doesn't do.
    """
    for name, value in kwargs.items():
        kind = type(of).__name__
        if name not in SHARED_ARGUMENTS:
            raise ArgumentError(f"{kind} takes no argument {name!r}.{nearest(name, known)}")
        if value is not None and value is not False:
            raise UnsupportedError(
                f"{name} was given, which {kind} can't do anything with: leave it out, since ignoring it might make "
                "the result another than you think."
            )


def runs_uncompiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` that `torch.compile(model)` leaves as it is, with one warning.

    What is read off the ids decides the shape of everything after it: compiling takes minutes, is done anew for each
    text, and fails in torch 2.13.
    """

    @torch.compiler.disable(reason="shapes follow from the token ids")
    def as_it_is(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        if kind not in _SAID:
            _SAID.add(kind)
            warnings.warn(
                f"torch.compile has nothing to compile in a {kind.__name__}, whose shapes follow from the token ids: "
                "it runs uncompiled. What compiles is a GPTHF's decoding, by Engine(model, tokenizer, compile=True).",
                stacklevel=2,
            )
        return forward(self, *args, **kwargs)

    @functools.wraps(forward)
    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (as_it_is if torch.compiler.is_compiling() else forward)(self, *args, **kwargs)

    return entry


_SAID: set[type] = set()


def name_cache_twice(output: Any) -> Any:
    """What transformers' `generate` returned; its cache, if it has one, now goes by both names."""
    cache = getattr(output, CACHE_NAME, None)
    if cache is not None:
        for name in CACHE_NAMES:
            setattr(output, name, cache)
    return output


@dataclass
class CachedOutput(CausalLMOutputWithPast):
    """transformers' output, whose cache goes by both names under every release."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_as_here(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_as_here(key))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_as_here(name), value)

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of a key, or `default`."""
        return super().get(_as_here(key), default)


for _name in CACHE_NAMES:
    if _name != CACHE_NAME:
        setattr(CachedOutput, _name, property(lambda output: getattr(output, CACHE_NAME)))


def _as_here(key: Any) -> Any:
    return CACHE_NAME if isinstance(key, str) and key in CACHE_NAMES else key

"""The model that a command runs: one that keeps its context as it is, or one whose context is dropped or folded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from thoughtformer.cli.options import check_adapter, check_method
from thoughtformer.errors import InputError

if TYPE_CHECKING:
    from thoughtformer.compression import CompressedModel, Method
    from thoughtformer.models import GPTHFForCausalLM

__all__ = ["Compression", "open_model", "takes_compression"]

#: Settings that have an option of their own.
OF_OPTIONS = {
    "max_entries": "--max-entries",
    "removed": "--removed",
    "span_tokens": "--span-tokens",
    "max_bytes": "--max-bytes",
    "policy": "--removed, --sentences or --max-bytes",
}


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What a command line says of the context; each field with an option is one of `takes_compression`'s commands.

    Args:
        context: a saved one, which says itself how it was made.
    """

    method: Annotated[
        str | None,
        typer.Option(
            help="Drop or fold the context of a plain model: streaming, quantised, kvzip, h2o, sentinel and others.",
            callback=check_method,
        ),
    ] = None
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Fold the context of a plain model by sentinels: tiny-gpt-sentinel, or a folder of `compress train`.",
            callback=check_adapter,
        ),
    ] = None
    removed: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the tokens seen that is not held; where spans fold, 0.9 by default.", min=0.0, max=0.99
        ),
    ] = None
    max_entries: Annotated[
        int | None, typer.Option(help="Hold at most so many entries, by methods that count.", min=1)
    ] = None
    span_tokens: Annotated[
        int | None, typer.Option(help="Tokens folded at a time; default: by the fraction removed.", min=2)
    ] = None
    sentences: Annotated[
        bool, typer.Option("--sentences", help="Fold each sentence as it ends, instead of by fraction.")
    ] = False
    max_bytes: Annotated[
        int | None, typer.Option(help="Hold at most so many bytes, by methods that fold and quantised.", min=1)
    ] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method: first_tokens=8; repeatable.")
    ] = None
    context: Path | None = None

    def on(self, context: Path | None = None) -> Compression:
        """What was said, of a saved context if one was given; raises `InputError` for what doesn't go together."""
        asked = replace(self, context=context)
        asked._check()
        return asked

    def _check(self) -> None:
        given = self.given
        if self.context is not None and (given or self.method is not None):
            wrong = ", ".join([*given, *["--method"] * (self.method is not None)])
            raise InputError(
                f"{self.context} goes on being folded as it was: leave out {wrong}, or make another context."
            )
        if self.sentences and (others := [name for name in given if name != "--sentences" and name != "--set"]):
            raise InputError(f"--sentences folds each sentence as it ends: leave out {', '.join(others)}.")
        if self.max_bytes is not None and self.removed is not None:
            raise InputError("--max-bytes says how much is held: leave out --removed.")
        if given and not self.is_asked:
            raise InputError(f"{', '.join(given)} says how an --adapter folds, or what a --method drops: name one.")

    @property
    def given(self) -> list[str]:
        """The options that say how much is held."""
        options = {
            "--removed": self.removed is not None,
            "--max-entries": self.max_entries is not None,
            "--span-tokens": self.span_tokens is not None,
            "--sentences": self.sentences,
            "--max-bytes": self.max_bytes is not None,
            "--set": bool(self.settings),
        }
        return [name for name, is_given in options.items() if is_given]

    @property
    def is_asked(self) -> bool:
        """Whether anything is to be dropped or folded."""
        return self.method is not None or self.adapter is not None or self.context is not None


def takes_compression(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `Compression`, whose last parameter `compression` gets what they say."""
    kinds = get_type_hints(Compression, include_extras=True)
    options = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name])
        for field in fields(Compression)
        if get_origin(kinds[field.name]) is Annotated
    ]

    @wraps(command)
    def with_options(**given: Any) -> None:
        compression = Compression(**{option.name: given.pop(option.name) for option in options})
        command(**given, compression=compression)

    own = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for name, parameter in signature(command, eval_str=True).parameters.items()
        if name != "compression"
    ]
    with_options.__signature__ = Signature([*own, *options])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
    return with_options


def open_model(
    name: str, asked: Compression, *, allow_extrapolation: bool
) -> tuple[GPTHFForCausalLM | CompressedModel, Any]:
    """The model in a folder as the command line wants it, and its tokenizer.

    A causal LM of transformers of which nothing is to be dropped keeps its whole context.

    Raises:
        InputError, ConfigError: options that don't go together.
        CheckpointError, TokenizerError, UnsupportedError: a model that can't be loaded, or not be compressed.
    """
    from thoughtformer.compression import compress
    from thoughtformer.models import GPTHFForCausalLM
    from thoughtformer.models.loading import load

    loaded, tokenizer = load(name)
    if not asked.is_asked:
        if isinstance(loaded, GPTHFForCausalLM):
            loaded.config.allow_extrapolation = allow_extrapolation
            return loaded, tokenizer
        return compress(loaded, "full", allow_extrapolation=allow_extrapolation), tokenizer
    if getattr(loaded.config, "num_encoder_layers", 0):
        raise InputError(
            f"{name} is a GPTHF, which folds its sentences itself: --method, --adapter and --context are for plain "
            "models, e.g. --model tiny-gpt."
        )
    method = _method(asked, tokenizer, loaded.config)
    if method.needs_adapter and asked.adapter is None:
        raise InputError(
            f"{asked.context} was folded with sentinels: give the --adapter that it was made with."
            if asked.context is not None
            else "give the sentinels' --adapter, e.g. --adapter tiny-gpt-sentinel with --model tiny-gpt."
        )
    return (
        compress(
            loaded,
            method,
            adapter=asked.adapter,
            tokenizer=tokenizer,
            allow_extrapolation=allow_extrapolation,
        ),
        tokenizer,
    )


def _method(asked: Compression, tokenizer: Any, config: Any) -> Method:
    from thoughtformer.compression.context import read_manifest
    from thoughtformer.compression.folding import Folding
    from thoughtformer.compression.registry import METHODS, make_method, method_from, trained_with

    if asked.context is not None:
        manifest = read_manifest(asked.context)
        return method_from(manifest["method"], manifest["settings"])
    name = asked.method or "sentinel"
    settings = dict(map(_setting, asked.settings or ()))
    for setting, option in OF_OPTIONS.items():
        if setting in settings:
            raise InputError(f"--set {setting}: that is {option}'s.")
    if asked.max_entries is not None:
        settings["max_entries"] = asked.max_entries
    if not issubclass(METHODS[name], Folding):
        has_bytes = "max_bytes" in [field.name for field in fields(METHODS[name])]
        if has_bytes and asked.max_bytes is not None:
            settings["max_bytes"] = asked.max_bytes
        of_folds = ("--span-tokens", "--sentences", *([] if has_bytes else ["--max-bytes"]))
        wrong = [option for option in asked.given if option in of_folds]
        if wrong:
            raise InputError(f"{', '.join(wrong)}: for methods that fold; {name} drops tokens.")
        return make_method(name, settings if asked.removed is None else settings | {"removed": asked.removed})
    trained = trained_with(asked.adapter, [name])
    policy = _policy(asked, tokenizer, config, trained)
    known = [field.name for field in fields(policy)]
    of_policy = {setting: settings.pop(setting) for setting in list(settings) if setting in known}
    return make_method(name, trained | settings | {"policy": replace(policy, **of_policy)})


def _policy(asked: Compression, tokenizer: Any, config: Any, trained: dict[str, Any]) -> Any:
    """When spans fold."""
    from thoughtformer.compression import ByteBudget, RemovedFraction, SentenceEnds
    from thoughtformer.compression.solving import span_for

    if asked.sentences:
        return SentenceEnds.for_tokenizer(tokenizer)
    removed = 0.9 if asked.removed is None else asked.removed
    span = asked.span_tokens
    if span is None:
        span = span_for(removed, trained.get("num_sentinels", 1), config.max_position_embeddings)
    if asked.max_bytes is not None:
        return ByteBudget(max_bytes=asked.max_bytes, span_tokens=span)
    return RemovedFraction(removed=removed, span_tokens=span)


def _setting(given: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON has it, or a word."""
    name, equals, value = given.partition("=")
    if not equals or not name:
        raise InputError(f"--set {given!r}: write name=value, as first_tokens=8.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value

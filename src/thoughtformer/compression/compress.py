"""The one line that switches compression on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from thoughtformer.compression.adapter import SentinelAdapter, read_adapter_manifest
from thoughtformer.compression.method import Method
from thoughtformer.compression.model import CompressedModel
from thoughtformer.compression.registry import METHODS, make_method
from thoughtformer.errors import ConfigError
from thoughtformer.models.backbone import backbone_of, bare_model
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.names import BUNDLED_ADAPTERS, resolve

__all__ = ["compress"]


def compress(
    model: nn.Module,
    method: str | Method = "sentinel",
    *,
    adapter: str | Path | SentinelAdapter | None = None,
    tokenizer: Any = None,
    execution: str = "gathered",
    prefill_tokens: int = 512,
    allow_extrapolation: bool = False,
    **settings: Any,
) -> CompressedModel:
    """A view of `model` that holds only a part of its context, for use as it is or in a `with` block.

    Args:
        model: a causal LM of transformers, or this package's plain GPT; with peft's adapters in its layers or not.
        method: a name of `METHODS` with its settings as keywords, or a method.
        adapter: for the sentinel method: a bundled name, a folder that `compress train` wrote, or the adapter itself.
        tokenizer: the model's, for methods that go by what tokens say, such as ends of sentences.
        execution: `gathered`, `dense` or `flex`: how a text is read at once. All give the same.
        prefill_tokens: tokens of a prompt computed at once while a cache is kept.
        allow_extrapolation: take texts longer than the model was trained for.
        settings: the method's own, such as `max_entries=256`, or `removed=0.5` for any that removes a fraction.

    Raises:
        UnsupportedError: a model whose architecture or attention backend can't be compressed exactly.
        ConfigError: an unknown method, or settings that it doesn't take.
        CheckpointError: an adapter that is missing, truncated, or another model's.
    """
    method = _made(method, settings, adapter)
    if tokenizer is not None:
        method = method.for_tokenizer(tokenizer)
    model = cast(PreTrainedModel, bare_model(model))
    backbone = backbone_of(model)
    loaded: SentinelAdapter | None = adapter if isinstance(adapter, SentinelAdapter) else None
    try:
        if isinstance(adapter, str | Path):
            if not method.needs_adapter:
                raise ConfigError(f"the method {method.name!r} takes no adapter.")
            folder = resolve(adapter, BUNDLED_ADAPTERS)
            loaded = SentinelAdapter.load(backbone, folder, fingerprint=fingerprint(model))
        if loaded is not None:
            mine, trained = (
                {name: getattr(settings, name) for name in method.trained_settings}
                for settings in (method, loaded.config)
            )
            if mine != trained:
                raise ConfigError(f"the adapter was trained with {_listed(trained)}; the method has {_listed(mine)}.")
        return CompressedModel(
            model,
            method,
            loaded,
            backbone=backbone,
            execution=execution,
            prefill_tokens=prefill_tokens,
            allow_extrapolation=allow_extrapolation,
        )
    except BaseException:
        if loaded is not None:
            loaded.remove()
        backbone.close()
        raise


def _made(method: str | Method, settings: dict[str, Any], adapter: str | Path | SentinelAdapter | None) -> Method:
    """The method by its name and settings; those that its adapter was trained with unless others are asked for."""
    if isinstance(method, Method):
        if settings:
            raise ConfigError(f"settings {sorted(settings)} go with a method's name; this method is made already.")
        return method
    if not isinstance(method, str):
        names = ", ".join(METHODS)
        raise ConfigError(f"method={method!r} is a {type(method).__name__}; give a Method or one of {names}.")
    trained = METHODS[method].trained_settings if method in METHODS and adapter is not None else ()
    if trained and isinstance(adapter, str | Path):
        values = read_adapter_manifest(resolve(adapter, BUNDLED_ADAPTERS))
        settings = {name: values[name] for name in trained} | settings
    elif trained and isinstance(adapter, SentinelAdapter):
        settings = {name: getattr(adapter.config, name) for name in trained} | settings
    return make_method(method, settings)


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())

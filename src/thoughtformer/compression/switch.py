"""The one line that switches compression on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from thoughtformer.compression.adapter import SentinelAdapter, read_adapter_manifest
from thoughtformer.compression.compressed import CompressedModel
from thoughtformer.compression.method import Method
from thoughtformer.compression.sentinel import Sentinel
from thoughtformer.compression.settings import METHODS
from thoughtformer.errors import ConfigError, nearest
from thoughtformer.models.backbone import backbone_of
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.models.loading import BUNDLED_ADAPTERS, resolve

__all__ = ["compress"]


def compress(
    model: PreTrainedModel,
    method: str | Method = "sentinel",
    *,
    adapter: str | Path | SentinelAdapter | None = None,
    execution: str = "gathered",
    prefill_tokens: int = 512,
    allow_extrapolation: bool = False,
    **settings: Any,
) -> CompressedModel:
    """A view of `model` that holds only a part of its context, for use as it is or in a `with` block.

    Args:
        model: a causal LM of transformers, or this package's plain GPT.
        method: a name of `METHODS` with its settings as keywords, or a method.
        adapter: for the sentinel method: a bundled name, a folder that `compress train` wrote, or the adapter itself.
        execution: `gathered`, `dense` or `flex`: how a text is read at once. All give the same.
        prefill_tokens: tokens of a prompt computed at once while a cache is kept.
        allow_extrapolation: take texts longer than the model was trained for.
        settings: the method's own, such as `policy=RemovedFraction(removed=0.5)`.

    Raises:
        UnsupportedError: a model whose architecture or attention backend can't be compressed exactly.
        ConfigError: an unknown method, or settings that it doesn't take.
        CheckpointError: an adapter that is missing, truncated, or another model's.
    """
    backbone = backbone_of(model)
    base = fingerprint(model)
    if isinstance(method, str):
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}.{nearest(method, METHODS)}")
        kind = METHODS[method]
        known = [field.name for field in fields(kind)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"{method} has no setting {name!r}.{nearest(name, known)}")
        if kind is Sentinel and isinstance(adapter, str | Path):
            # What the adapter was trained for, unless it is asked for and so checked below.
            values = read_adapter_manifest(resolve(adapter, BUNDLED_ADAPTERS))
            settings = {"num_sentinels": values["num_sentinels"], "see_earlier": values["see_earlier"]} | settings
        elif kind is Sentinel and isinstance(adapter, SentinelAdapter):
            trained = adapter.config
            settings = {"num_sentinels": trained.num_sentinels, "see_earlier": trained.see_earlier} | settings
        method = kind(**settings)
    elif not isinstance(method, Method):
        names = ", ".join(METHODS)
        raise ConfigError(f"method={method!r} is a {type(method).__name__}; give a Method or one of {names}.")
    elif settings:
        raise ConfigError(f"settings {sorted(settings)} go with a method's name; this method is made already.")
    if isinstance(adapter, str | Path):
        if not method.needs_adapter:
            raise ConfigError(f"the method {method.name!r} takes no adapter.")
        adapter = SentinelAdapter.load(backbone, resolve(adapter, BUNDLED_ADAPTERS), fingerprint=base)
    if isinstance(method, Sentinel) and adapter is not None:
        trained = adapter.config
        if (method.num_sentinels, method.see_earlier) != (trained.num_sentinels, trained.see_earlier):
            adapter.remove()
            raise ConfigError(
                f"the adapter was trained with num_sentinels={trained.num_sentinels}, see_earlier="
                f"{trained.see_earlier}; the method has {method.num_sentinels} and {method.see_earlier}."
            )
    try:
        return CompressedModel(
            model,
            method,
            adapter,
            backbone=backbone,
            execution=execution,
            prefill_tokens=prefill_tokens,
            allow_extrapolation=allow_extrapolation,
            base_fingerprint=base,
        )
    except BaseException:
        if adapter is not None:
            adapter.remove()
        raise

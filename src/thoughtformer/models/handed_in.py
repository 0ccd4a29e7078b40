"""Attention handed into a transformers model, for one call alone.

transformers' attention modules look up what attends by `config._attn_implementation`. While a model has views, its
attention modules read that name from a stand-in of the configuration, which answers with ours and shares all else; the
configuration itself is never touched. Ours attends by what came with the call, in the keyword argument `handed_in`, and
is the model's own where nothing came. So nothing of a call lies where another could meet it: several views of one
model, in several threads, and the model itself are used side by side, under hooks that copy arguments, too.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["ACTING", "BACKENDS", "SCORE_ARGUMENTS", "Acting", "Attend", "HandedIn", "Original", "acting", "hand_in"]

#: Attention backends that read a mask of ours.
BACKENDS = ("sdpa", "eager")
#: What a module may tell its attention of how scores become weights (a cap, a sink): only its own attention applies it.
SCORE_ARGUMENTS = ("softcap", "s_aux")
PREFIX = "thoughtformer_"


@runtime_checkable
class Original(Protocol):
    """The model's own attention of queries over keys; `mask` is additive, None for plain causal attention."""

    def __call__(
        self,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
        mask: Float[Tensor, "batch #heads seq keys"] | None,
    ) -> Float[Tensor, "batch heads seq head_dim"]: ...


@runtime_checkable
class Attend(Protocol):
    """Attention handed in: what each query of a layer gets, given that layer's new queries, keys and values.

    Keys and queries are rotated already, where the model rotates them. `scale` is the factor of the scores.
    """

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
        *,
        scale: float,
        dropout: float,
        original: Original,
    ) -> Float[Tensor, "batch heads seq head_dim"]: ...


@dataclass(frozen=True, eq=False)
class Acting:
    """On which entries of one call an adapter acts, numbered row by row; None for all."""

    entries: Int[Tensor, " acted_on"] | None = None

    @property
    def is_idle(self) -> bool:
        """There is no entry to act on."""
        return self.entries is not None and len(self.entries) == 0


#: What adapters act on in the call under way in this thread; None where the model is called as it is.
ACTING: ContextVar[Acting | None] = ContextVar("acting", default=None)


@contextmanager
def acting(on: Acting | None) -> Iterator[None]:
    """Has adapters act, for as long as this thread is inside."""
    token = ACTING.set(on)
    try:
        yield
    finally:
        ACTING.reset(token)


class HandedIn:
    """What one call hands to the model: attention, and what its adapter acts on.

    One object, because accelerate's hooks copy containers. It notes which module asked for a layer's attention, and
    what else it told.
    """

    def __init__(self, attend: Attend, acting: Acting | None = None) -> None:
        self.attend = attend
        self.acting = acting
        self.asked: dict[int, nn.Module] = {}
        self.told: dict[int, dict[str, Any]] = {}


class _StandIn:
    """A configuration, but for the name of the attention that modules look up."""

    __slots__ = ("_of",)

    def __init__(self, of: PreTrainedConfig) -> None:
        object.__setattr__(self, "_of", of)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of, name)
        return PREFIX + value if name == "_attn_implementation" and value in BACKENDS else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._of, name, value)

    @property
    def __class__(self) -> type:  # type: ignore[override]  what isinstance asks
        return type(self._of)

    # A copy of a model has no views, and so the configuration itself.

    def __copy__(self) -> PreTrainedConfig:
        return self._of

    def __deepcopy__(self, memo: dict[int, Any]) -> PreTrainedConfig:
        return copy.deepcopy(self._of, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._of,)


def _itself(value: Any) -> Any:
    return value


_LOCK = threading.Lock()
#: `counts` is set in a thread that holds the lock, or waits for it.
_THREAD = threading.local()
#: How many views each model has.
_NUM_VIEWS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
#: Models of views that are gone, not yet counted. The collector may find a view, or what closes one, at any time, also
#: in a thread that holds the lock: there nothing waits for it, and whoever holds it sees to the rest.
_LEFT: deque[PreTrainedModel] = deque()


def hand_in(model: PreTrainedModel, view: object) -> Callable[[], None]:
    """Has the model's attention modules ask for what calls hand in, until `view` is gone or the result is called."""
    _register()
    with _counting():
        _NUM_VIEWS[model] = _NUM_VIEWS.get(model, 0) + 1
        for module in model.modules():
            config = module.__dict__.get("config")
            # Models make masks by their configuration, which stays; what is inside only attends by it.
            is_inside = not isinstance(module, PreTrainedModel)
            if is_inside and isinstance(config, PreTrainedConfig) and type(config) is not _StandIn:
                module.__dict__["config"] = _StandIn(config)
    _count_those_left()
    collected = weakref.finalize(view, _leave, model)
    collected.atexit = False

    def release() -> None:
        if collected.detach() is not None:
            _LEFT.append(model)
            if not getattr(_THREAD, "counts", False):
                with _counting():
                    _count_left()
                _count_those_left()

    return release


@contextmanager
def _counting() -> Iterator[None]:
    _THREAD.counts = True  # before the lock is taken: the collector may run at any time
    try:
        with _LOCK:
            yield
    finally:
        _THREAD.counts = False


def _leave(model: PreTrainedModel) -> None:
    _LEFT.append(model)
    if not getattr(_THREAD, "counts", False):
        _count_those_left()


def _count_those_left() -> None:
    while _LEFT and _LOCK.acquire(blocking=False):
        _THREAD.counts = True
        try:
            _count_left()
        finally:
            _LOCK.release()
            _THREAD.counts = False


def _count_left() -> None:
    """Gives each model whose last view has left its configuration back; called with the lock held."""
    while _LEFT:
        model = _LEFT.popleft()
        _NUM_VIEWS[model] -= 1
        if _NUM_VIEWS[model]:
            continue
        for module in model.modules():
            config = module.__dict__.get("config")
            if type(config) is _StandIn:
                module.__dict__["config"] = config._of


def _own_attention(module: nn.Module, backend: str) -> Callable[..., Any]:
    eager = cast(Callable[..., Any], getattr(sys.modules[type(module).__module__], "eager_attention_forward", None))
    return eager if backend == "eager" else ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager)


def _implementation(backend: str) -> Callable[..., Any]:
    """An attention for transformers' registry: the one handed in, or else just what `backend` does."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        handed_in: HandedIn | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        own = _own_attention(module, backend)
        if handed_in is None:
            return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        layer = cast(int, module.layer_idx)
        handed_in.asked[layer] = module
        handed_in.told[layer] = kwargs
        scores = {name: kwargs[name] for name in SCORE_ARGUMENTS if kwargs.get(name) is not None}
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling

        def original(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            if backend == "eager" and key.shape[2] > query.shape[2]:
                # Held keys are strided, and products of strided matrices differ in the last bit from those of
                # transformers' own cache.
                key, value = key.contiguous(), value.contiguous()
            if mask is None and backend == "eager":
                shape = (query.shape[2], key.shape[2])
                hidden = torch.ones(shape, dtype=torch.bool, device=query.device).triu(1 + shape[1] - shape[0])
                mask = query.new_zeros(shape).masked_fill(hidden, torch.finfo(query.dtype).min)[None, None]
            return own(module, query, key, value, mask, scaling=scaling, dropout=dropout, **scores)[0].transpose(1, 2)

        output = handed_in.attend(layer, query, key, value, scale=scale, dropout=dropout, original=original)
        return output.transpose(1, 2), None

    return attention


def _register() -> None:
    for backend in BACKENDS:
        if PREFIX + backend not in ALL_ATTENTION_FUNCTIONS:
            # Both registries: with a name in one alone, transformers drops padding masks without a word.
            AttentionInterface.register(PREFIX + backend, _implementation(backend))
            AttentionMaskInterface.register(PREFIX + backend, ALL_MASK_ATTENTION_FUNCTIONS[backend])

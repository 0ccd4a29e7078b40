"""What each rule and method is, said once more: slow, from the papers' words, without the package's masks and caches.

Every file here may define `RULES` and `METHODS`, by the names that the package knows them by. Tests of contract,
parity, engine, sessions and evaluation run all that is registered in the package, with the settings given here, and
fail for what has no twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thoughtformer.compression import Method
from thoughtformer.models.backbone import backbone_of
from thoughtformer.models.handed_in import Acting, acting

__all__ = ["METHODS", "RULES", "MethodTwin", "Place", "RuleTwin", "attended_by_hand", "masked", "window_of"]


class Place(NamedTuple):
    """Where a token of one document stands."""

    sentence: int
    is_end: bool


@dataclass(frozen=True, kw_only=True)
class RuleTwin:
    """A body rule's twin.

    Attributes:
        reads: whether token i of a document may read token j, j <= i.
        settings: of GPTHFConfig, beside body_visibility, with which tests build it.
    """

    reads: Callable[[Sequence[Place], int, int], bool]
    settings: dict[str, Any] = field(default_factory=dict)


def masked(model: Any, embeddings: Tensor, positions: Tensor, allowed: Tensor, near: Tensor | None = None) -> Tensor:
    """The model itself under a mask of transformers' kind; its eager attention would round to float32.

    With its adapter acting everywhere: it acts in a view's calls alone. `near` is the mask of layers with a window;
    where all are tokens, the last so many.
    """

    def additive(mask: Tensor) -> Tensor:
        hidden = torch.zeros(mask.shape, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)
        return hidden[None, None]

    mask: Any = additive(allowed)
    if window_of(model, "sliding_attention") is not None:
        if near is None:
            distance = positions[:, None] - positions
            near = (distance >= 0) & (distance < window_of(model, "sliding_attention"))
        mask = {"full_attention": mask, "sliding_attention": additive(near)}
    with acting(Acting()):
        return model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            attention_mask=mask,
            use_cache=False,
        ).logits[0]


def attended_by_hand(
    model: Any,
    ids: Sequence[int],
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    attend_near: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits with a layer's attention written out by `attend(layer, query, key, value)` over one row.

    All have a head for each query head, and queries are scaled. `attend_near(window, ...)` is the same for layers with
    a window; None: they read what is near, raw.
    """
    view = backbone_of(model)

    def handed(layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, **_: Any) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        kinds = getattr(model.config, "layer_types", None)
        window = window_of(model, kinds[layer]) if kinds else None
        if window is not None and attend_near is not None:
            return attend_near(window, query[0] * scale, key[0], value[0])[None]
        if window is not None:
            output = torch.zeros_like(query)
            for j in range(len(ids)):
                near = range(max(0, j - window + 1), j + 1)
                weights = (query[:, :, j] * scale).unsqueeze(2) @ key[:, :, near].mT
                output[:, :, j] = (weights.softmax(dim=-1) @ value[:, :, near]).squeeze(2)
            return output
        return attend(layer, query[0] * scale, key[0], value[0])[None]

    hidden = view.forward(view.embed(torch.tensor([ids])), torch.arange(len(ids))[None], handed)
    return view.logits(hidden)[0]


def window_of(model: Any, kind: str) -> int | None:
    """How many of the last tokens layers of a kind read, itself included; None: all."""
    is_there = kind == "sliding_attention" and kind in (getattr(model.config, "layer_types", None) or ())
    return model.config.sliding_window if is_there else None


@dataclass(frozen=True, kw_only=True)
class MethodTwin:
    """A compression method's twin: either `reads` or `logits`.

    Attributes:
        cases: the method by names for the tests, set so that it does something within 20 tokens and goes on doing it.
        reads: of a method that only drops: which positions each token reads, itself included.
        logits: the model's logits of one text under the method: (model, ids, method, adapter) -> (tokens, vocab).
        atol: how close the two can be.
        served: a family and a setting by names, for the tests of engine and server, whose texts are longer.
    """

    cases: dict[str, Method]
    reads: Callable[[Any, Sequence[int]], Iterable[Iterable[int]]] | None = None
    logits: Callable[[Any, Sequence[int], Any, Any], Tensor] | None = None
    atol: float = 1e-9
    served: dict[str, tuple[str, Method]] = field(default_factory=dict)

    def expected(self, model: Any, ids: Sequence[int], method: Method, adapter: Any) -> Tensor:
        """The logits that the method must give."""
        if self.logits is not None:
            return self.logits(model, ids, method, adapter)
        assert self.reads is not None
        allowed = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        for token, positions in enumerate(self.reads(method, ids)):
            allowed[token, list(positions)] = True
        return masked(model, model.get_input_embeddings()(torch.tensor(ids)), torch.arange(len(ids)), allowed)


RULES: dict[str, RuleTwin] = {}
METHODS: dict[str, MethodTwin] = {}

for _module in iter_modules(__path__):
    _found = import_module(f"{__name__}.{_module.name}")
    RULES |= getattr(_found, "RULES", {})
    METHODS |= getattr(_found, "METHODS", {})

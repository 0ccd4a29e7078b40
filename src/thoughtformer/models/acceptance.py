"""Which models of transformers can be compressed exactly: read off their configuration, and proven by running them.

A short text through the attention that is handed in must give the model's own logits. What a short text can't show
(windows, chunks, rotations that change with length) must be understood by its name, or refuses by its name.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thoughtformer.errors import UnsupportedError
from thoughtformer.models.handed_in import SCORE_ARGUMENTS

__all__ = ["TESTED_MODELS", "check_configuration", "check_told", "prove", "windows_of"]

#: transformers' `model_type`s whose every contract is tested (tests/contract/test_backbones.py); others run by proof.
TESTED_MODELS = (
    "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo2", "opt",
    "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
#: What an attention module may tell its attention, and changes nothing that ours must know.
HARMLESS_ARGUMENTS = ("position_ids", "use_cache", "output_attentions", "cache_position", "is_causal")
LAYER_TYPES = ("full_attention", "sliding_attention")
ROTATIONS = ("default", "linear", "llama3", "yarn", "proportional")
#: Parts of keys that name what a short text can't show.
TELLING = ("window", "chunk", "softcap", "sink", "alibi", "bidirectional", "mamba", "ssm", "linear_attn", "linear_conv")
#: Keys with such a part that are understood, or say nothing while the rest is.
UNDERSTOOD = (
    "sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern",
    "attn_logit_softcapping", "final_logit_softcapping", "chunk_size_feed_forward",
)  # fmt: skip
#: Tokens of the proof, and the most that are read to see a window at work.
PROOF_TOKENS, MOST_PROOF_TOKENS = 64, 1100
#: How far logits may differ, beside the largest: what rounding comes to, and nothing that a wrong mask would leave.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
COARSE = 0.06

_PROVEN: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()
_TOLD: set[str] = set()


def check_configuration(model: PreTrainedModel) -> None:
    """Raises `UnsupportedError` for what a configuration names and nobody here understands."""
    name, config = type(model).__name__, model.config
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise UnsupportedError(f"{name} is no causal LM of text alone: load its text model.")
    kinds = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if kinds:
        raise UnsupportedError(
            f"{name} has layers of {', '.join(sorted(kinds))}. Layers of full and of sliding-window attention can be "
            "compressed."
        )
    if getattr(config, "reorder_and_upcast_attn", False):
        raise UnsupportedError(f"{name}: reorder_and_upcast_attn=True bypasses the attention interface.")
    for parameters in _rotations(getattr(config, "rope_parameters", None)):
        kind = parameters.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"{name}: rope_type={kind!r} changes the rotations of a text as it grows, so that a compressed text "
                "can't equal a whole one."
            )
        if kind not in ROTATIONS:
            raise UnsupportedError(f"{name}: rope_type={kind!r} isn't understood.")
    for key, value in config.to_dict().items():
        if value and key not in UNDERSTOOD and any(part in key for part in TELLING):
            raise UnsupportedError(
                f"{name}: {key}={value!r} isn't understood, so that its text might not be read right."
            )


def _rotations(parameters: Any) -> Iterable[Mapping[str, Any]]:
    """One set of parameters, or one for each kind of layer."""
    if not parameters:
        return []
    by_kind = [value for value in parameters.values() if isinstance(value, Mapping)]
    return by_kind or [parameters]


def check_told(model: PreTrainedModel, told: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises `UnsupportedError` for what attention modules tell their attention, and ours wouldn't heed."""
    known = {"sliding_window", *SCORE_ARGUMENTS, *HARMLESS_ARGUMENTS}
    unknown = sorted({key for of in told.values() for key, value in of.items() if value is not None} - known)
    if unknown:
        raise UnsupportedError(
            f"{type(model).__name__} hands {', '.join(unknown)} to its attention, which isn't understood."
        )
    config = model.config
    has_windows = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None)
    )
    if has_windows and not any(of.get("sliding_window") for of in told.values()):
        raise UnsupportedError(f"{type(model).__name__} doesn't say which of its layers have a sliding window.")


def windows_of(told: Mapping[int, Mapping[str, Any]]) -> list[int | None]:
    """Each layer's window, None for all tokens."""
    return [told[layer].get("sliding_window") or None for layer in sorted(told)]


def prove(model: PreTrainedModel, windows: Sequence[int | None], logits: Callable[[Tensor, Any, int], Tensor]) -> None:
    """Compares the model's own logits of short texts with those through attention that is handed in.

    Done once for a model as it is. An architecture that no test covers is told once.

    Args:
        model: in evaluation mode; in training, where dropout would differ, only what tests cover is taken.
        windows: of each layer.
        logits: of the last so many of some ids, through an attention.

    Raises:
        UnsupportedError: they differ; says where, and by how much.
    """
    config = model.config
    state = (config._attn_implementation, model.dtype, tuple(windows))
    proven = _PROVEN.setdefault(model, set())
    if model.training and config.model_type not in TESTED_MODELS:
        raise UnsupportedError(
            f"{type(model).__name__} is taken by a proof, which dropout spoils: call model.eval() before compress()."
        )
    if model.training or state in proven:
        return
    limit = int(getattr(config, "max_position_embeddings", None) or MOST_PROOF_TOKENS)
    window = min((window for window in windows if window is not None), default=0)
    lengths = {min(PROOF_TOKENS, limit)}
    if PROOF_TOKENS < window + 8 <= min(limit, MOST_PROOF_TOKENS):
        lengths.add(window + 8)
    for length in sorted(lengths):
        _compare(model, length, windows, logits)
    proven.add(state)
    if config.model_type not in TESTED_MODELS and config.model_type not in _TOLD:
        _TOLD.add(config.model_type)
        warnings.warn(
            f"{type(model).__name__} (model_type {config.model_type!r}) is not among the architectures that the tests "
            f"cover, but {max(lengths)} tokens have the very logits of the model itself.",
            UserWarning,
            stacklevel=2,
        )


@torch.no_grad()
def _compare(
    model: PreTrainedModel, length: int, windows: Sequence[int | None], logits: Callable[[Tensor, Any, int], Tensor]
) -> None:
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    vocab_size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    ids = (torch.arange(length, device=device)[None] * 7919 + 13) % vocab_size
    # A large vocabulary's head costs more than all layers: behind a window a few tokens tell.
    last = length if length <= PROOF_TOKENS else PROOF_TOKENS // 4
    keep = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits[0, -last:]
    found = logits(ids, _attend_by(windows), last)[0]
    largest = float(own.abs().max())
    differences = (own - found.to(own.device)).abs().amax(dim=-1) / max(largest, 1e-30)
    worst = float(differences.max())
    if not worst <= TOLERANCE.get(own.dtype, COARSE):
        at = length - last + int(differences.argmax())
        raise UnsupportedError(
            f"{type(model).__name__}: of {length} tokens, the logits of number {at} differ by {worst:.2g} of the "
            "largest from the model's own once its attention is handed in. It can't be compressed exactly."
        )


def _attend_by(windows: Sequence[int | None]) -> Any:
    """The model's own attention, causal, within each layer's window."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, *, original: Any, **_: Any) -> Tensor:
        window, length = windows[layer], query.shape[2]
        if window is None or length <= window:
            return original(query, key, value, None)
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place
        hidden = (distance < 0) | (distance >= window)
        mask = query.new_zeros(length, length).masked_fill(hidden, torch.finfo(query.dtype).min)
        return original(query, key, value, mask[None, None])

    return attend

"""Short names for weights, so that what belongs to one model is refused by another; and how a change is noticed.

A fingerprint reads every value of every weight, at about a gigabyte a second. A checksum reads them all, too, at the
rate of the memory, and tells whether a fingerprint is still true: also after edits that leave no trace in PyTorch, such
as those through `.data`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thoughtformer.errors import UnsupportedError
from thoughtformer.models.checksum import checksum
from thoughtformer.models.gpthf.causal_lm import GPTHFForCausalLM

__all__ = [
    "Followed",
    "base_weights",
    "encoder_fingerprint",
    "encoder_weights",
    "exact_fingerprint",
    "fingerprint",
    "tensors_fingerprint",
    "weights_state",
]

#: Values read at once, so that no second copy of a large weight is made.
CHUNK_VALUES = 1 << 24


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits from every weight's name, shape and values, these rounded to bfloat16.

    A model has the same in whichever precision it was loaded. What an adapter of a view has put into it doesn't count.

    Raises:
        UnsupportedError: weights that can't be read here.
    """
    return tensors_fingerprint(base_weights(model), lambda values: values.to(torch.bfloat16))


def exact_fingerprint(model: nn.Module) -> str:
    """The same from every bit of every weight, for what holds numbers that were computed with them."""
    return tensors_fingerprint(base_weights(model), lambda values: values)


def tensors_fingerprint(named: Iterable[tuple[str, Tensor]], rounded: Callable[[Tensor], Tensor]) -> str:
    """16 hexadecimal digits from names, shapes and values, as `rounded` makes them.

    Raises:
        UnsupportedError: tensors that can't be read here.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in named:
        for part in _plain(name, tensor):
            digest.update(f"{name} {tuple(part.shape)}".encode())
            is_float = part.is_floating_point()
            for values in part.reshape(-1).split(CHUNK_VALUES):
                kept = rounded(values) if is_float else values
                digest.update(kept.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's parts that hold its bits: itself, or the tensors that a quantised one is made of."""
    tensor = tensor.detach()
    if tensor.is_meta:
        raise UnsupportedError(
            f"the weight {name} is offloaded, and can't be read here: what is kept by a fingerprint of the weights "
            "(adapters, saved contexts, sessions) needs the model whole, on one device."
        )
    if isinstance(tensor, DTensor):  # a part of it may be on another process
        yield tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = cast(Any, tensor).__tensor_flatten__()
        for part in names:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    elif tensor.is_quantized:
        yield tensor.int_repr()
        yield tensor.dequantize()
    else:
        yield tensor


def base_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All weights by name, in order of their names, without those of a view's own adapter.

    Parameters, saved buffers, and what torch's quantised layers keep packed, where no parameter shows it.
    """
    unsaved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    named = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0] not in unsaved)]
    named += _packed_weights(model)
    kept = [(name.replace(".base_layer.", "."), tensor) for name, tensor in named if not _is_of_view(name)]
    return sorted(kept, key=lambda pair: pair[0])


def _packed_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and biases of torch's quantised layers, by name."""
    for name, module in model.named_modules():
        unpack = getattr(module, "_weight_bias", None)
        if unpack is not None and not any(True for _ in module.children()):
            for part, tensor in zip(("weight", "bias"), unpack(), strict=True):
                if tensor is not None:
                    yield f"{name}.{part}", tensor


def _is_of_view(name: str) -> bool:
    return ".lora_" in name and ".sentinel." in name


def encoder_fingerprint(model: GPTHFForCausalLM) -> str:
    """32 hexadecimal digits of all that a sentence's vector depends on: shape, dtype, and every bit of the weights.

    Models that share an encoder share vectors.
    """
    config = model.config
    digest = hashlib.blake2b(digest_size=16)
    shape = (model.model.sentence_vector_shape, config.layer_shape("encoder"), config.rope_theta, config.rms_norm_eps)
    digest.update(repr((shape, config.num_encoder_layers, str(model.dtype))).encode())
    for name, weight in encoder_weights(model):
        for part in _plain(name, weight):
            digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encoder_weights(model: GPTHFForCausalLM) -> list[tuple[str, Tensor]]:
    """All weights that a sentence's vector depends on, by name."""
    inner = model.model
    encoder = next(stage for stage in inner.stages if stage.name == "encoder")
    parts = {"embedding": inner.embed_tokens, "summaries": inner.summary_tokens, "encoder": encoder}
    return [
        (f"{part}.{name}", weight)
        for part, module in parts.items()
        if module is not None
        for name, weight in (*module.named_parameters(), *_packed_weights(module))
    ]


def weights_state(weights: Iterable[Tensor]) -> bytes | None:
    """What changes with any edit of weights, at the rate of the memory; None where some can't be read here."""
    weights = list(weights)
    if any(weight.is_meta for weight in weights):
        return None
    return hashlib.blake2b(b"".join(checksum(weight) for weight in weights), digest_size=16).digest()


class Followed:
    """A value made of weights, which is made anew when they have changed.

    Args:
        make: the value.
        weights: what it is made of, now.
    """

    def __init__(self, make: Callable[[], str], weights: Callable[[], Iterable[Tensor]]) -> None:
        self._make = make
        self._weights = weights
        self._seen: bytes | None = None
        self._value = ""

    def __call__(self) -> str:
        """The value, as the weights are now."""
        seen = weights_state(self._weights())
        if seen is None:
            return self._make()  # which says what is wrong
        if seen != self._seen:
            self._value, self._seen = self._make(), seen
        return self._value

"""Short names for weights, so that what belongs to one model is refused by another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from thoughtformer.models.causal_lm import GPTHFForCausalLM

__all__ = ["encoder_fingerprint", "encoder_weights", "fingerprint"]

SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits from every weight's name, shape, sum, and some of its values.

    Taken in bfloat16, so that a model has the same fingerprint in whichever precision it was loaded.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.named_parameters()):
        rounded = weight.detach().to(torch.bfloat16).reshape(-1).view(torch.int16)
        step = max(1, rounded.numel() // SAMPLES)
        digest.update(f"{name} {tuple(weight.shape)} {int(rounded.long().sum())}".encode())
        digest.update(rounded[::step].cpu().numpy().tobytes())
    return digest.hexdigest()


def encoder_fingerprint(model: GPTHFForCausalLM) -> str:
    """32 hexadecimal digits of all that a sentence's vector depends on: shape, dtype, and every bit of the weights.

    Models that share an encoder share vectors.
    """
    config = model.config
    digest = hashlib.blake2b(digest_size=16)
    shape = (model.model.sentence_vector_shape, config.layer_shape("encoder"), config.rope_theta, config.rms_norm_eps)
    digest.update(repr((shape, config.num_encoder_layers, str(model.dtype))).encode())
    for name, weight in encoder_weights(model):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encoder_weights(model: GPTHFForCausalLM) -> list[tuple[str, nn.Parameter]]:
    """All weights that a sentence's vector depends on, by name."""
    inner = model.model
    encoder = next(stage for stage in inner.stages if stage.name == "encoder")
    parts = {"embedding": inner.embed_tokens, "summaries": inner.summary_tokens, "encoder": encoder}
    return [
        (f"{part}.{name}", weight)
        for part, module in parts.items()
        if module is not None
        for name, weight in module.named_parameters()
    ]

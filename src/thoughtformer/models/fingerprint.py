"""A short name for a model's weights, so that what belongs to one model is refused by another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["fingerprint"]

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

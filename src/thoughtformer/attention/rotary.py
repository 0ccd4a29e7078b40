"""Rotary positions (arXiv 2104.09864), by explicit position: entries keep their rotation wherever they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Rotary", "rotate"]


@dataclass(frozen=True)
class Rotary:
    """Rotations of heads `head_dim` wide: pair i turns by theta ** (-2 i / head_dim) a position."""

    head_dim: int
    theta: float

    def angles(
        self, position: Int[Tensor, " tokens"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "tokens 1 half"], Float[Tensor, "tokens 1 half"]]:
        """Cosine and sine of each position's rotation, computed in at least float32."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        frequency = _frequencies(self.head_dim, self.theta, exact, position.device)
        angle = (position.to(exact)[:, None] * frequency)[:, None, :]
        return angle.cos().to(dtype), angle.sin().to(dtype)


@cache
def _frequencies(head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " half"]:
    # A cached tensor must serve training as well, which tensors made in inference mode can't.
    with torch.inference_mode(False):
        return theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)


def rotate(
    states: Float[Tensor, "tokens heads head_dim"],
    cos: Float[Tensor, "tokens 1 half"],
    sin: Float[Tensor, "tokens 1 half"],
) -> Float[Tensor, "tokens heads head_dim"]:
    """Rotates pair (i, i + head_dim/2) of each head by its position's angle, Llama's pairing."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

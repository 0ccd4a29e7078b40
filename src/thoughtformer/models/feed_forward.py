"""What follows attention in a layer, by its kind."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from thoughtformer.models.packed_linear import PackableLinear

__all__ = ["FeedForward", "SwiGLU", "feed_forward"]


class FeedForward(nn.Module):
    """A layer's feed-forward part."""

    #: The linear layer whose output adds to the residual stream.
    down_proj: nn.Linear


class SwiGLU(FeedForward):
    """SwiGLU (arXiv 2002.05202); one product makes gate and up."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = PackableLinear(hidden_size, 2 * intermediate_size, False)
        self.down_proj = PackableLinear(intermediate_size, hidden_size, False)

    def forward(self, hidden_states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def feed_forward(hidden_size: int, intermediate_size: int) -> FeedForward:
    """The feed-forward part of a layer with these widths."""
    return SwiGLU(hidden_size, intermediate_size)

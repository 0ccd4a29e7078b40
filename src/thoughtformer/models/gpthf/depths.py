"""What later stages read of the encoder beside its last layer: the outputs of its others, each by gains of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["DepthGains", "with_depths"]


class DepthGains(nn.ParameterList):
    """A gain for each feature of the embeddings' and of every encoder layer's output but the last; 0 at first."""

    def __init__(self, num_depths: int, hidden_size: int) -> None:
        # Vectors, not one matrix: they are no linear map, and optimisers treat matrices as such.
        super().__init__(torch.zeros(hidden_size) for _ in range(num_depths))

    __call__ = nn.Module.__call__  # a plain list of parameters refuses to be called

    def forward(self) -> list[Tensor]:
        """The gains; by a call, so that hooks fetch what lies elsewhere."""
        return list(self)


def with_depths(
    hidden_states: Float[Tensor, "entries hidden"], depths: list[Tensor], gains: Sequence[Tensor]
) -> Float[Tensor, "entries hidden"]:
    """The states with those of each depth added, weighted by feature; the last depth is the states themselves."""
    return hidden_states + sum(gain * depth for gain, depth in zip(gains, depths[:-1], strict=True))

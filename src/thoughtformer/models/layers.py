"""Llama layers over a flat list of tokens: linear parts never see padding, attention is handed in."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from thoughtformer.attention import rotate
from thoughtformer.models.configuration_gpthf import GPTHFConfig

__all__ = ["Attend", "Layer"]

#: Given one layer's rotated queries, rotated keys, and values, the attention output of every token.
Attend = Callable[
    [
        Float[Tensor, "tokens heads head_dim"],
        Float[Tensor, "tokens kv_heads head_dim"],
        Float[Tensor, "tokens kv_heads head_dim"],
    ],
    Float[Tensor, "tokens heads head_dim"],
]


class Attention(nn.Module):
    """Multi-head or grouped-query attention; one product makes queries, keys and values."""

    def __init__(self, config: GPTHFConfig) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.qkv_proj = nn.Linear(config.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, False)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        angles: tuple[Float[Tensor, "tokens 1 half"], Float[Tensor, "tokens 1 half"]],
        attend: Attend,
    ) -> Float[Tensor, "tokens hidden"]:
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv_proj(hidden_states).view(hidden_states.shape[0], heads, self.head_dim)
        cos, sin = (angle.to(qkv.dtype) for angle in angles)
        # Queries and keys turn alike, so they turn together.
        turned = rotate(qkv[:, : self.num_heads + self.num_kv_heads], cos, sin)
        query, key = turned[:, : self.num_heads], turned[:, self.num_heads :]
        output = attend(query, key, qkv[:, self.num_heads + self.num_kv_heads :])
        return self.o_proj(output.reshape(hidden_states.shape[0], self.num_heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202); one product makes gate and up."""

    def __init__(self, config: GPTHFConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, False)

    def forward(self, hidden_states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Pre-normalised attention and SwiGLU, both residual."""

    def __init__(self, config: GPTHFConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        angles: tuple[Float[Tensor, "tokens 1 half"], Float[Tensor, "tokens 1 half"]],
        attend: Attend,
    ) -> Float[Tensor, "tokens hidden"]:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), angles, attend)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


def residual_projections(layer: Layer) -> tuple[Tensor, Tensor]:
    """The weights whose outputs add to the residual stream, initialised smaller the deeper the stack."""
    return layer.attention.o_proj.weight, layer.mlp.down_proj.weight

"""Llama layers over a flat list of tokens: linear parts never see padding, attention is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from thoughtformer.attention.joint import attend_jointly
from thoughtformer.attention.rotary import rotate
from thoughtformer.models.feed_forward import feed_forward
from thoughtformer.models.gpthf.configuration import LayerShape
from thoughtformer.models.packed_linear import PackableLinear

__all__ = [
    "Angles",
    "SummaryAngles",
    "LayerAttention",
    "Layer",
    "compiled_step",
    "compiled_step_with_summaries",
    "step_through",
    "step_with_summaries",
]

#: Cosine and sine of each token's rotation.
Angles = tuple[Float[Tensor, "tokens 1 half"], Float[Tensor, "tokens 1 half"]]
SummaryAngles = tuple[Float[Tensor, "entries 1 half"], Float[Tensor, "entries 1 half"]]

#: Given one layer's rotated queries, rotated keys, and values, the attention output of every token. In a decoder also
#: given rotated keys and values of new summaries, where there are some.
LayerAttention = Callable[..., Float[Tensor, "tokens heads head_dim"]]


class Attention(nn.Module):
    """Multi-head or grouped-query attention; one product makes queries, keys and values."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.num_heads = shape.num_heads
        self.num_kv_heads = shape.num_kv_heads
        self.qkv_proj = PackableLinear(
            shape.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, False
        )
        self.o_proj = PackableLinear(self.num_heads * self.head_dim, shape.hidden_size, False)

    def project(
        self, hidden_states: Float[Tensor, "tokens hidden"], angles: Angles
    ) -> tuple[
        Float[Tensor, "tokens heads head_dim"],
        Float[Tensor, "tokens kv_heads head_dim"],
        Float[Tensor, "tokens kv_heads head_dim"],
    ]:
        """Rotated queries, rotated keys, and values."""
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv_proj(hidden_states).view(hidden_states.shape[0], heads, self.head_dim)
        cos, sin = (angle.to(qkv.dtype) for angle in angles)
        # Queries and keys turn alike, so they turn together.
        turned = rotate(qkv[:, : self.num_heads + self.num_kv_heads], cos, sin)
        return turned[:, : self.num_heads], turned[:, self.num_heads :], qkv[:, self.num_heads + self.num_kv_heads :]

    def project_summaries(
        self, hidden_states: Float[Tensor, "entries hidden"], angles: SummaryAngles
    ) -> tuple[Float[Tensor, "entries kv_heads head_dim"], Float[Tensor, "entries kv_heads head_dim"]]:
        """Rotated keys, and values, of entries that ask nothing."""
        query_width = self.num_heads * self.head_dim
        if type(self.qkv_proj) is PackableLinear and not self.qkv_proj.weight.is_meta:
            kv = F.linear(hidden_states, self.qkv_proj.weight[query_width:])
        else:  # an adapter's layer, which adds to the product and not to the weight; or a hook has to fetch the weight
            kv = self.qkv_proj(hidden_states)[:, query_width:]
        kv = kv.view(hidden_states.shape[0], 2 * self.num_kv_heads, self.head_dim)
        cos, sin = (angle.to(kv.dtype) for angle in angles)
        return rotate(kv[:, : self.num_kv_heads], cos, sin), kv[:, self.num_kv_heads :]

    def output(self, attended: Float[Tensor, "tokens heads head_dim"]) -> Float[Tensor, "tokens hidden"]:
        """All heads' attention outputs, mixed."""
        return self.o_proj(attended.reshape(attended.shape[0], self.num_heads * self.head_dim))


class Layer(nn.Module):
    """Pre-normalised attention and SwiGLU, both residual."""

    #: What transformers' `gradient_checkpointing_enable` sets, with the function that calls a layer again.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = feed_forward(shape.hidden_size, shape.intermediate_size)

    def before_attention(
        self, hidden_states: Float[Tensor, "tokens hidden"], angles: Angles
    ) -> tuple[
        Float[Tensor, "tokens heads head_dim"],
        Float[Tensor, "tokens kv_heads head_dim"],
        Float[Tensor, "tokens kv_heads head_dim"],
    ]:
        """Queries, keys and values."""
        return self.attention.project(self.attention_norm(hidden_states), angles)

    def summary_entries(
        self, summaries: Float[Tensor, "entries hidden"], angles: SummaryAngles
    ) -> tuple[Float[Tensor, "entries kv_heads head_dim"], Float[Tensor, "entries kv_heads head_dim"]]:
        """Keys and values of summaries that this layer's tokens read, by the layer's own norm and projections."""
        return self.attention.project_summaries(self.attention_norm(summaries), angles)

    def after_attention(
        self, hidden_states: Float[Tensor, "tokens hidden"], attended: Float[Tensor, "tokens heads head_dim"]
    ) -> Float[Tensor, "tokens hidden"]:
        """The layer's output."""
        hidden_states = hidden_states + self.attention.output(attended)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        angles: Angles,
        attend: LayerAttention,
        summaries: tuple[Float[Tensor, "entries hidden"], SummaryAngles] | None = None,
    ) -> Float[Tensor, "tokens hidden"]:
        """The layer's output.

        Args:
            hidden_states: of the tokens, of which there may be none.
            angles: the tokens' rotations.
            attend: given queries, keys and values, and with `summaries` their keys and values.
            summaries: states and rotations of summaries that the tokens, or later ones, read.
        """
        made: tuple[Tensor, ...] = self.before_attention(hidden_states, angles)
        if summaries is not None:
            made += self.summary_entries(*summaries)
        return self.after_attention(hidden_states, attend(*made))

    def run(
        self, through: Callable[[Tensor], Tensor], hidden_states: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"]:
        """What `through`, this layer as it is called in a pass, makes of the states.

        With gradient checkpointing it is computed once more for gradients, and so must write nothing.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            assert self._gradient_checkpointing_func is not None
            return self._gradient_checkpointing_func(through, hidden_states)
        return through(hidden_states)


def step_through(
    layers: Sequence[Layer],
    hidden_states: Float[Tensor, "one hidden"],
    angles: Angles,
    keys: Sequence[Float[Tensor, "one kv_heads slots head_dim"]],
    values: Sequence[Float[Tensor, "one kv_heads slots head_dim"]],
    slot: Int[Tensor, " one"],
    num_keys: int,
) -> Float[Tensor, "one hidden"]:
    """One token of one row through layers that attend to their first `num_keys` slots, its own written to `slot`.

    What `Layer.forward` and a cache do together, as one function that can be compiled.
    """
    for layer, key_slots, value_slots in zip(layers, keys, values, strict=True):
        query, key, value = layer.before_attention(hidden_states, angles)
        key_slots.index_copy_(2, slot, key.unsqueeze(2))
        value_slots.index_copy_(2, slot, value.unsqueeze(2))
        # Heads that share keys become further queries of one head.
        grouped = query.view(1, key.shape[1], query.shape[1] // key.shape[1], query.shape[2])
        attended = F.scaled_dot_product_attention(grouped, key_slots[:, :, :num_keys], value_slots[:, :, :num_keys])
        hidden_states = layer.after_attention(hidden_states, attended.view_as(query))
    return hidden_states


def step_with_summaries(
    layers: Sequence[Layer],
    hidden_states: Float[Tensor, "one hidden"],
    angles: Angles,
    keys: Sequence[Float[Tensor, "one kv_heads slots head_dim"]],
    values: Sequence[Float[Tensor, "one kv_heads slots head_dim"]],
    slot: Int[Tensor, " one"],
    num_keys: int,
    turn: Angles,
    summary_keys: Sequence[Float[Tensor, "one kv_heads summary_slots head_dim"]],
    summary_values: Sequence[Float[Tensor, "one kv_heads summary_slots head_dim"]],
    num_summaries: int,
) -> Float[Tensor, "one hidden"]:
    """`step_through` for a decoder's token, which also reads its first `num_summaries` summaries, turned by `turn`."""
    parts = zip(layers, keys, values, summary_keys, summary_values, strict=True)
    for layer, key_slots, value_slots, summary_key, summary_value in parts:
        query, key, value = layer.before_attention(hidden_states, angles)
        key_slots.index_copy_(2, slot, key.unsqueeze(2))
        value_slots.index_copy_(2, slot, value.unsqueeze(2))
        grouped = (1, key.shape[1], query.shape[1] // key.shape[1], query.shape[2])
        attended = attend_jointly(
            query.view(grouped),
            key_slots[:, :, :num_keys],
            value_slots[:, :, :num_keys],
            None,
            rotate(query, *turn).view(grouped),
            summary_key[:, :, :num_summaries],
            summary_value[:, :, :num_summaries],
            None,
        )
        hidden_states = layer.after_attention(hidden_states, attended.view_as(query))
    return hidden_states


@cache
def compiled_step(num_layers: int, hidden_size: int) -> Callable[..., Tensor]:
    """`step_through`, compiled: cached lengths are free, the number and shape of layers are not."""
    return _compiled(step_through)


@cache
def compiled_step_with_summaries(num_layers: int, hidden_size: int) -> Callable[..., Tensor]:
    """`step_with_summaries`, compiled."""
    return _compiled(step_with_summaries)


def _compiled(function: FunctionType) -> Callable[..., Tensor]:
    # torch bounds the compilations of a piece of code, and past that runs it as it is, without a word: so each shape of
    # stage gets a copy of the code to itself.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=True)


def residual_projections(layer: Layer) -> tuple[Tensor, Tensor]:
    """The weights whose outputs add to the residual stream, initialised smaller the deeper the stack."""
    return layer.attention.o_proj.weight, layer.mlp.down_proj.weight

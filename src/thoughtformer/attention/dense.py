"""The slow, obvious twin: softmax under one dense mask over all tokens of all rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["DenseAttention"]


@dataclass(frozen=True, eq=False)
class DenseAttention:
    """Softmax attention under a dense mask, written out; the attention that `attn_implementation="eager"` selects."""

    mask: Bool[Tensor, "tokens tokens"]

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The attention output of every token."""
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~self.mask, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights.to(value.dtype), value)

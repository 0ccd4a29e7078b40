"""The slow, obvious twin: one dense mask over all tokens of all rows, straight from the rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thoughtformer.attention.structure import TokenStructure
from thoughtformer.attention.visibility import VisibilityRule

__all__ = ["DenseAttention", "dense_mask"]


def dense_mask(rule: VisibilityRule, tokens: TokenStructure) -> Bool[Tensor, "tokens tokens"]:
    """`mask[i, j]`: whether token i reads token j. Rows don't see each other."""
    return rule.visible(tokens.map(lambda f: f.unsqueeze(1)), tokens.map(lambda f: f.unsqueeze(0)))


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

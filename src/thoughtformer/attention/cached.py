"""Attention of new tokens to what a cache holds: padded per row, under the rule's mask where one is needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["CachedAttention"]


#: From so many keys on, two products read a cache faster than torch's fused kernel on CPUs: 29 against 23 GB/s at 16
#: rows of 4,096 (docs/log.md).
LONG_KEYS = 2048


def _is_plain_cpu(states: Tensor) -> bool:
    """Not in half precision, whose softmax the fused kernel takes in float32."""
    return states.device.type == "cpu" and states.dtype in (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """How the new tokens of all rows attend to `num_keys` slots of each row's cache.

    Attributes:
        query_index: flat index of each row's new tokens, padded with 0.
        output_index: each new token's place in the padded outputs; None where every row has as many.
        mask: what each may read; None where that is every slot.
        num_keys: slots read, the longest row's.
    """

    query_index: Int[Tensor, "rows queries"]
    output_index: Int[Tensor, " tokens"] | None
    mask: Bool[Tensor, "rows queries keys"] | None
    num_keys: int

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "rows kv_heads slots head_dim"],
        value: Float[Tensor, "rows kv_heads slots head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The attention output of every new token; `key` and `value` are a cache's, the new entries among them."""
        heads, head_dim = query.shape[1:]
        folded = self.folded(query, key.shape[1])
        key, value = key[:, :, : self.num_keys], value[:, :, : self.num_keys]
        if (
            self.mask is None
            and self.query_index.shape[1] == 1
            and self.num_keys >= LONG_KEYS
            and _is_plain_cpu(folded)
        ):
            scores = folded @ key.transpose(2, 3) * head_dim**-0.5
            output = scores.softmax(dim=-1) @ value
        else:
            mask = self.folded_mask(heads // key.shape[1])
            output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
        return self.unfolded(output, heads)

    def folded(
        self, query: Float[Tensor, "tokens heads head_dim"], kv_heads: int
    ) -> Float[Tensor, "rows kv_heads folded head_dim"]:
        """Padded by row; heads that share keys become further queries of one head, so that no key is copied."""
        rows, num_queries = self.query_index.shape
        heads, head_dim = query.shape[1:]
        padded = query if self.output_index is None else query.index_select(0, self.query_index.reshape(-1))
        padded = padded.view(rows, num_queries, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
        return padded.reshape(rows, kv_heads, heads // kv_heads * num_queries, head_dim)

    def folded_mask(self, groups: int) -> Bool[Tensor, "rows 1 folded keys"] | None:
        """The mask for queries folded by `groups` heads that share keys."""
        return None if self.mask is None else self.mask.repeat(1, groups, 1).unsqueeze(1)

    def unfolded(
        self, output: Float[Tensor, "rows kv_heads folded head_dim"], heads: int
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Each new token's output."""
        rows, num_queries = self.query_index.shape
        kv_heads, head_dim = output.shape[1], output.shape[3]
        output = output.view(rows, kv_heads, heads // kv_heads, num_queries, head_dim).permute(0, 3, 1, 2, 4)
        output = output.reshape(rows * num_queries, heads, head_dim)
        return output if self.output_index is None else output.index_select(0, self.output_index)

    def to(self, device: torch.device) -> CachedAttention:
        if device.type == "cpu":
            return self
        return CachedAttention(
            self.query_index.to(device),
            None if self.output_index is None else self.output_index.to(device),
            None if self.mask is None else self.mask.to(device),
            self.num_keys,
        )

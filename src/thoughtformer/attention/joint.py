"""Tokens that read summaries of earlier sentences beside tokens: one softmax over both, queries turned for each.

A word-level decoder's tokens count tokens among themselves, and sentences to the summaries, so the two need queries of
different rotation. The same three executions as elsewhere, each with a part for tokens and one for summaries: a dense
mask, gathered blocks, and what caches hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.attention.cached import CachedAttention

__all__ = [
    "CachedJointAttention",
    "DenseJointAttention",
    "JointBlocks",
    "JointPlan",
    "attend_jointly",
]


def attend_jointly(
    query: Float[Tensor, "*batch queries head_dim"],
    key: Float[Tensor, "*batch keys head_dim"],
    value: Float[Tensor, "*batch keys head_dim"],
    mask: Bool[Tensor, "*#batch queries keys"] | None,
    summary_query: Float[Tensor, "*batch queries head_dim"],
    summary_key: Float[Tensor, "*batch summaries head_dim"],
    summary_value: Float[Tensor, "*batch summaries head_dim"],
    summary_mask: Bool[Tensor, "*#batch queries summaries"] | None,
) -> Float[Tensor, "*batch queries head_dim"]:
    """Softmax attention over keys and summaries together; a mask of None reads all."""
    scores = query @ key.transpose(-1, -2)
    summary_scores = summary_query @ summary_key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if summary_mask is not None:
        summary_scores = summary_scores.masked_fill(~summary_mask, float("-inf"))
    joined = torch.cat([scores, summary_scores], dim=-1) * query.shape[-1] ** -0.5
    weights = joined.softmax(dim=-1, dtype=torch.promote_types(joined.dtype, torch.float32)).to(value.dtype)
    num_keys = key.shape[-2]
    return weights[..., :num_keys] @ value + weights[..., num_keys:] @ summary_value


def _each_head(states: Tensor, heads: int) -> Tensor:
    """Keys or values (entries, kv heads, head_dim), repeated for grouped-query heads."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], dim=1)


@dataclass(frozen=True, eq=False)
class DenseJointAttention:
    """The slow, obvious twin: dense masks over all tokens and all summaries."""

    mask: Bool[Tensor, "tokens tokens"]
    summary_mask: Bool[Tensor, "tokens summaries"]

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        summary_query: Float[Tensor, "tokens heads head_dim"],
        summary_key: Float[Tensor, "summaries kv_heads head_dim"],
        summary_value: Float[Tensor, "summaries kv_heads head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The attention output of every token."""
        heads = query.shape[1]

        def by_head(states: Tensor) -> Tensor:
            return _each_head(states, heads).transpose(0, 1)

        output = attend_jointly(
            by_head(query),
            by_head(key),
            by_head(value),
            self.mask,
            by_head(summary_query),
            by_head(summary_key),
            by_head(summary_value),
            self.summary_mask,
        )
        return output.transpose(0, 1)

    def to(self, device: torch.device) -> DenseJointAttention:
        return DenseJointAttention(self.mask.to(device), self.summary_mask.to(device))


@dataclass(frozen=True, eq=False)
class JointBlocks:
    """Blocks of like length that attend in one call, with what they read of tokens and of summaries."""

    query_index: Int[Tensor, "blocks queries"]
    key_index: Int[Tensor, "blocks keys"]
    mask: Bool[Tensor, "blocks queries keys"]
    summary_index: Int[Tensor, "blocks summaries"]
    summary_mask: Bool[Tensor, "blocks queries summaries"]

    def to(self, device: torch.device) -> JointBlocks:
        return JointBlocks(
            self.query_index.to(device),
            self.key_index.to(device),
            self.mask.to(device),
            self.summary_index.to(device),
            self.summary_mask.to(device),
        )


@dataclass(frozen=True, eq=False)
class JointPlan:
    """Blocks of sentences that cover every token once as a query, and where each token's output then lies."""

    blocks: list[JointBlocks]
    output_index: Int[Tensor, " tokens"]

    def to(self, device: torch.device) -> JointPlan:
        return JointPlan([blocks.to(device) for blocks in self.blocks], self.output_index.to(device))

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        summary_query: Float[Tensor, "tokens heads head_dim"],
        summary_key: Float[Tensor, "summaries kv_heads head_dim"],
        summary_value: Float[Tensor, "summaries kv_heads head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The attention output of every token."""
        heads, head_dim = query.shape[1:]
        key, value = _each_head(key, heads), _each_head(value, heads)
        summary_key, summary_value = _each_head(summary_key, heads), _each_head(summary_value, heads)
        outputs = []
        for blocks in self.blocks:
            output = attend_jointly(
                _take(query, blocks.query_index),
                _take(key, blocks.key_index),
                _take(value, blocks.key_index),
                blocks.mask.unsqueeze(1),
                _take(summary_query, blocks.query_index),
                _take(summary_key, blocks.summary_index),
                _take(summary_value, blocks.summary_index),
                blocks.summary_mask.unsqueeze(1),
            )
            outputs.append(output.transpose(1, 2).reshape(-1, heads, head_dim))
        return torch.cat(outputs).index_select(0, self.output_index)


def _take(
    states: Float[Tensor, "entries heads head_dim"], index: Int[Tensor, "blocks length"]
) -> Float[Tensor, "blocks heads length head_dim"]:
    taken = states.index_select(0, index.reshape(-1))
    return taken.reshape(*index.shape, *states.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class CachedJointAttention:
    """How the new tokens of all rows attend to the slots of two caches: tokens, and summaries."""

    own: CachedAttention
    summaries: CachedAttention

    def to(self, device: torch.device) -> CachedJointAttention:
        return CachedJointAttention(self.own.to(device), self.summaries.to(device))

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "rows kv_heads slots head_dim"],
        value: Float[Tensor, "rows kv_heads slots head_dim"],
        summary_query: Float[Tensor, "tokens heads head_dim"],
        summary_key: Float[Tensor, "rows kv_heads summary_slots head_dim"],
        summary_value: Float[Tensor, "rows kv_heads summary_slots head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The attention output of every new token; keys and values are the caches', new entries among them."""
        kv_heads = key.shape[1]
        output = attend_jointly(
            self.own.folded(query, kv_heads),
            key[:, :, : self.own.num_keys],
            value[:, :, : self.own.num_keys],
            self.own.folded_mask(query.shape[1] // kv_heads),
            self.summaries.folded(summary_query, kv_heads),
            summary_key[:, :, : self.summaries.num_keys],
            summary_value[:, :, : self.summaries.num_keys],
            self.summaries.folded_mask(query.shape[1] // kv_heads),
        )
        return self.own.unfolded(output, query.shape[1])

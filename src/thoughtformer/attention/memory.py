"""Tokens that read summaries of earlier sentences beside tokens: one softmax over both, queries turned for each.

A word-level decoder's tokens count tokens among themselves, and sentences to the summaries, so the two need queries of
different rotation. The same three executions as elsewhere, each with its own part (`rule`, over tokens) and its memory
(`memory_rule`, over summaries): a dense mask, gathered blocks, and what caches hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.attention.gathered import MAX_GATHERED_KEYS, grouped, padded, recent_start, runs
from thoughtformer.attention.held import HeldAttention
from thoughtformer.attention.structure import TokenStructure
from thoughtformer.attention.visibility import EarlierSentences, OwnSentence

__all__ = [
    "DenseMemoryAttention",
    "HeldMemoryAttention",
    "MemoryPlan",
    "attend_jointly",
    "dense_memory_attention",
    "memory_plan",
]


#: Scores of one head that a call computes at most: 2**22 floats are 16 MiB, held several times over.
MAX_SCORES = 1 << 22


def attend_jointly(
    query: Float[Tensor, "*batch queries head_dim"],
    key: Float[Tensor, "*batch keys head_dim"],
    value: Float[Tensor, "*batch keys head_dim"],
    mask: Bool[Tensor, "*#batch queries keys"] | None,
    memory_query: Float[Tensor, "*batch queries head_dim"],
    memory_key: Float[Tensor, "*batch memory head_dim"],
    memory_value: Float[Tensor, "*batch memory head_dim"],
    memory_mask: Bool[Tensor, "*#batch queries memory"] | None,
) -> Float[Tensor, "*batch queries head_dim"]:
    """Softmax attention over keys and memory keys together; a mask of None reads all."""
    scores = query @ key.transpose(-1, -2)
    memory_scores = memory_query @ memory_key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if memory_mask is not None:
        memory_scores = memory_scores.masked_fill(~memory_mask, float("-inf"))
    joined = torch.cat([scores, memory_scores], dim=-1) * query.shape[-1] ** -0.5
    weights = joined.softmax(dim=-1, dtype=torch.promote_types(joined.dtype, torch.float32)).to(value.dtype)
    num_keys = key.shape[-2]
    return weights[..., :num_keys] @ value + weights[..., num_keys:] @ memory_value


def _each_head(states: Tensor, heads: int) -> Tensor:
    """Keys or values (entries, kv heads, head_dim), repeated for grouped-query heads."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], dim=1)


@dataclass(frozen=True, eq=False)
class DenseMemoryAttention:
    """The slow, obvious twin: dense masks over all tokens and all summaries."""

    mask: Bool[Tensor, "tokens tokens"]
    memory_mask: Bool[Tensor, "tokens summaries"]

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        memory_query: Float[Tensor, "tokens heads head_dim"],
        memory_key: Float[Tensor, "summaries kv_heads head_dim"],
        memory_value: Float[Tensor, "summaries kv_heads head_dim"],
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
            by_head(memory_query),
            by_head(memory_key),
            by_head(memory_value),
            self.memory_mask,
        )
        return output.transpose(0, 1)

    def to(self, device: torch.device) -> DenseMemoryAttention:
        return DenseMemoryAttention(self.mask.to(device), self.memory_mask.to(device))


def dense_memory_attention(
    tokens: TokenStructure, summaries: TokenStructure, rule: OwnSentence, memory_rule: EarlierSentences
) -> DenseMemoryAttention:
    """Masks straight from the rules; rows don't see each other."""
    query = tokens.map(lambda f: f.unsqueeze(1))
    mask = rule.visible(query, tokens.map(lambda f: f.unsqueeze(0)))
    return DenseMemoryAttention(mask, memory_rule.visible(query, summaries.map(lambda f: f.unsqueeze(0))))


@dataclass(frozen=True, eq=False)
class _MemoryBlocks:
    query_index: Int[Tensor, "blocks queries"]
    key_index: Int[Tensor, "blocks keys"]
    mask: Bool[Tensor, "blocks queries keys"]
    memory_index: Int[Tensor, "blocks memory"]
    memory_mask: Bool[Tensor, "blocks queries memory"]

    def to(self, device: torch.device) -> _MemoryBlocks:
        return _MemoryBlocks(
            self.query_index.to(device),
            self.key_index.to(device),
            self.mask.to(device),
            self.memory_index.to(device),
            self.memory_mask.to(device),
        )


@dataclass(frozen=True, eq=False)
class MemoryPlan:
    """Blocks of sentences that cover every token once as a query, and where each token's output then lies."""

    blocks: list[_MemoryBlocks]
    output_index: Int[Tensor, " tokens"]

    def to(self, device: torch.device) -> MemoryPlan:
        return MemoryPlan([blocks.to(device) for blocks in self.blocks], self.output_index.to(device))

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        memory_query: Float[Tensor, "tokens heads head_dim"],
        memory_key: Float[Tensor, "summaries kv_heads head_dim"],
        memory_value: Float[Tensor, "summaries kv_heads head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The attention output of every token."""
        heads, head_dim = query.shape[1:]
        key, value = _each_head(key, heads), _each_head(value, heads)
        memory_key, memory_value = _each_head(memory_key, heads), _each_head(memory_value, heads)
        outputs = []
        for blocks in self.blocks:
            output = attend_jointly(
                _take(query, blocks.query_index),
                _take(key, blocks.key_index),
                _take(value, blocks.key_index),
                blocks.mask.unsqueeze(1),
                _take(memory_query, blocks.query_index),
                _take(memory_key, blocks.memory_index),
                _take(memory_value, blocks.memory_index),
                blocks.memory_mask.unsqueeze(1),
            )
            outputs.append(output.transpose(1, 2).reshape(-1, heads, head_dim))
        return torch.cat(outputs).index_select(0, self.output_index)


def _take(
    states: Float[Tensor, "entries heads head_dim"], index: Int[Tensor, "blocks length"]
) -> Float[Tensor, "blocks heads length head_dim"]:
    taken = states.index_select(0, index.reshape(-1))
    return taken.reshape(*index.shape, *states.shape[1:]).transpose(1, 2)


def memory_plan(
    tokens: TokenStructure, summaries: TokenStructure, rule: OwnSentence, memory_rule: EarlierSentences
) -> MemoryPlan:
    """A block a sentence: its tokens read those of recent sentences, and summaries, as the rules say.

    Tokens and summaries are ordered by row, document and sentence; any of them may be missing.
    """
    stride = 1 + max(int(part.sentence.max()) if len(part) else 0 for part in (tokens, summaries))
    documents = 1 + max(int(part.document.max()) if len(part) else 0 for part in (tokens, summaries))
    token_document, summary_document = (part.row * documents + part.document for part in (tokens, summaries))
    start, length = runs(token_document * stride + tokens.sentence)
    document, sentence = token_document[start], tokens.sentence[start]
    key_start = recent_start(document, sentence, start, rule.recent)
    key_length = start + length - key_start
    # Up to the block's own sentence; the rule's mask decides whether that is read.
    place = summary_document * stride + summaries.sentence
    memory_start = torch.searchsorted(place, document * stride)
    memory_length = torch.searchsorted(place, document * stride + sentence, right=True) - memory_start

    blocks, output_index, num_outputs = [], torch.full((len(tokens),), -1), 0
    for width, members in grouped(length):
        most = int((key_length + memory_length)[members].max())
        for part in members.split(max(1, min(MAX_GATHERED_KEYS // most, MAX_SCORES // (most * width)))):
            query_index, is_query = padded(start[part], length[part], width)
            key_index, is_key = padded(key_start[part], key_length[part], int(key_length[part].max()))
            memory_index, is_memory = padded(memory_start[part], memory_length[part], int(memory_length[part].max()))
            query = tokens[query_index].map(lambda f: f.unsqueeze(2))
            mask = rule.visible(query, tokens[key_index].map(lambda f: f.unsqueeze(1)))
            memory_mask = memory_rule.visible(query, summaries[memory_index].map(lambda f: f.unsqueeze(1)))
            # A padded query reads everything: its output is dropped, but without keys it would be not-a-number.
            mask = (mask & is_key.unsqueeze(1)) | ~is_query.unsqueeze(2)
            blocks.append(
                _MemoryBlocks(query_index, key_index, mask, memory_index, memory_mask & is_memory.unsqueeze(1))
            )
            slots = torch.arange(query_index.numel()).view_as(query_index) + num_outputs
            output_index[query_index[is_query]] = slots[is_query]
            num_outputs += query_index.numel()
    assert bool((output_index >= 0).all()), "every token must be a query once"
    return MemoryPlan(blocks, output_index)


@dataclass(frozen=True, eq=False)
class HeldMemoryAttention:
    """How the new tokens of all rows attend to the slots of two caches: tokens, and summaries."""

    own: HeldAttention
    memory: HeldAttention

    def to(self, device: torch.device) -> HeldMemoryAttention:
        return HeldMemoryAttention(self.own.to(device), self.memory.to(device))

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "rows kv_heads slots head_dim"],
        value: Float[Tensor, "rows kv_heads slots head_dim"],
        memory_query: Float[Tensor, "tokens heads head_dim"],
        memory_key: Float[Tensor, "rows kv_heads memory_slots head_dim"],
        memory_value: Float[Tensor, "rows kv_heads memory_slots head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The attention output of every new token; keys and values are the caches', new entries among them."""
        kv_heads = key.shape[1]
        output = attend_jointly(
            self.own.folded(query, kv_heads),
            key[:, :, : self.own.num_keys],
            value[:, :, : self.own.num_keys],
            self.own.folded_mask(query.shape[1] // kv_heads),
            self.memory.folded(memory_query, kv_heads),
            memory_key[:, :, : self.memory.num_keys],
            memory_value[:, :, : self.memory.num_keys],
            self.memory.folded_mask(query.shape[1] // kv_heads),
        )
        return self.own.unfolded(output, query.shape[1])

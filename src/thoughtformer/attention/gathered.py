"""Attention by structure: gather each block's queries and the few keys that they may read, attend, scatter back.

A plan is made once a forward pass and used by every layer of a stage. It costs what the rule makes visible, where a
dense mask costs the square of the text. Blocks of like length share one call, so that padding stays small; linear
layers never see any padding. Plans are for many tokens; `thoughtformer.attention.held` serves the decode step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from thoughtformer.attention.structure import TokenStructure
    from thoughtformer.attention.visibility import VisibilityRule

__all__ = [
    "MAX_GATHERED_KEYS",
    "AttentionPlan",
    "Blocks",
    "PlanBuilder",
    "causal_plan",
    "grouped",
    "padded",
    "recent_start",
    "runs",
    "sentence_plan",
]

#: Blocks are split so that one call gathers at most this many keys: 2**20 keys of 64 floats are 256 MiB.
MAX_GATHERED_KEYS = 1 << 20


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of like length that attend in one call. Padded entries repeat index 0 and come last."""

    query_index: Int[Tensor, "blocks queries"]
    #: None where the keys are the queries: causal attention inside each block.
    key_index: Int[Tensor, "blocks keys"] | None
    mask: Bool[Tensor, "blocks queries keys"] | None
    #: The queries are all tokens in order, without padding: nothing need be gathered.
    in_order: bool = False

    def to(self, device: torch.device) -> Blocks:
        if device.type == "cpu":
            return self
        return Blocks(
            self.query_index.to(device),
            None if self.key_index is None else self.key_index.to(device),
            None if self.mask is None else self.mask.to(device),
            self.in_order,
        )


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Blocks that cover every token once as a query, and where each token's output then lies."""

    blocks: list[Blocks]
    #: Index of each token's output in the blocks' outputs laid end to end; None where that is the identity.
    output_index: Int[Tensor, " tokens"] | None

    def to(self, device: torch.device) -> AttentionPlan:
        output_index = None if self.output_index is None else self.output_index.to(device)
        return AttentionPlan([blocks.to(device) for blocks in self.blocks], output_index)

    def attend(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        *,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The attention output of every token; `scale` is head_dim**-0.5 unless given."""
        heads, head_dim = query.shape[1:]
        if key.shape[1] != heads:  # grouped-query: one gather serves all heads of a group
            key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
        outputs = []
        dtype = query.dtype
        for blocks in self.blocks:
            q = _take(query, blocks.query_index, blocks.in_order)
            if blocks.key_index is None:
                k, v = (_take(part, blocks.query_index, blocks.in_order) for part in (key, value))
            else:
                k, v = _take(key, blocks.key_index), _take(value, blocks.key_index)
            if _trains_faster_in_float32(q, k):
                q, k, v = q.float(), k.float(), v.float()
            if blocks.key_index is None:
                output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
            else:
                mask = None if blocks.mask is None else blocks.mask.unsqueeze(1)
                output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)
            outputs.append(output.transpose(1, 2).reshape(-1, heads, head_dim))
        if not outputs:
            return query
        output = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)
        return output if self.output_index is None else output.index_select(0, self.output_index)


def _take(
    states: Float[Tensor, "tokens heads head_dim"], index: Int[Tensor, "blocks length"], in_order: bool = False
) -> Float[Tensor, "blocks heads length head_dim"]:
    taken = states if in_order else states.index_select(0, index.reshape(-1))
    return taken.reshape(*index.shape, *states.shape[1:]).transpose(1, 2)


def _trains_faster_in_float32(query: Tensor, key: Tensor) -> bool:
    """bfloat16's backward over short keys is two to three times slower than float32's on CPUs (docs/log.md)."""
    is_training = query.requires_grad and torch.is_grad_enabled()
    return is_training and query.dtype == torch.bfloat16 and query.device.type == "cpu" and key.shape[2] <= 256


def _round_up(length: int) -> int:
    """Lengths that share a call: multiples of 4 to 32, then in steps of an eighth."""
    step = 4 if length <= 32 else 1 << max(length.bit_length() - 4, 2)
    return -(-length // step) * step


def runs(ordinal: Int[Tensor, " tokens"]) -> tuple[Int[Tensor, " runs"], Int[Tensor, " runs"]]:
    """Start and length of each run of equal ordinals."""
    if len(ordinal) == 0:
        return ordinal, ordinal
    _, length = torch.unique_consecutive(ordinal, return_counts=True)
    return length.cumsum(0) - length, length


def grouped(length: Int[Tensor, " runs"]) -> list[tuple[int, Int[Tensor, " members"]]]:
    """Runs that share a call: (longest member, members), by rounded length."""
    if len(length) == 0:
        return []
    lengths = length.tolist()
    members: dict[int, list[int]] = {}
    for run, run_length in enumerate(lengths):
        members.setdefault(_round_up(run_length), []).append(run)
    return [(max(lengths[run] for run in runs), torch.tensor(runs)) for _, runs in sorted(members.items())]


def padded(
    start: Int[Tensor, " runs"], length: Int[Tensor, " runs"], width: int
) -> tuple[Int[Tensor, "runs width"], Bool[Tensor, "runs width"]]:
    """Indices start, start+1, ... of each run, 0 past its length, and where they are real."""
    column = torch.arange(width)
    valid = column < length[:, None]
    return torch.where(valid, start[:, None] + column, 0), valid


def recent_start(
    document: Int[Tensor, " runs"], sentence: Int[Tensor, " runs"], start: Int[Tensor, " runs"], recent: int
) -> Int[Tensor, " runs"]:
    """Where the earliest of each run's own and `recent` earlier sentences starts; runs are sentences, in order."""
    if recent == 0:
        return start
    stride = int(sentence.max()) + 1
    place = document * stride + sentence
    return start[torch.searchsorted(place, document * stride + (sentence - recent).clamp(min=0))]


class PlanBuilder:
    """Collects blocks until every token is a query once."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.blocks: list[Blocks] = []
        self.output_index = torch.full((num_tokens,), -1)
        self.num_outputs = 0

    def add(
        self,
        query_index: Int[Tensor, "blocks queries"],
        valid: Bool[Tensor, "blocks queries"],
        key_index: Int[Tensor, "blocks keys"] | None = None,
        mask: Bool[Tensor, "blocks queries keys"] | None = None,
    ) -> None:
        """Blocks of `valid` queries over gathered keys (by default the queries themselves, causally)."""
        slots = torch.arange(query_index.numel()).view_as(query_index) + self.num_outputs
        self.output_index[query_index[valid]] = slots[valid]
        self.num_outputs += query_index.numel()
        self.blocks.append(Blocks(query_index, key_index, mask))

    def add_causal(self, index: Int[Tensor, " members"] | None, ordinal: Int[Tensor, " members"]) -> None:
        """Causal attention inside each run of `ordinal`, over the tokens at `index` (all of them if None)."""
        start, length = runs(ordinal)
        for width, members in grouped(length):
            inside, valid = padded(start[members], length[members], width)
            self.add(inside if index is None else index[inside], valid)

    def build(self) -> AttentionPlan:
        """The plan of all blocks added."""
        assert bool((self.output_index >= 0).all()), "every token must be a query once"
        identity = torch.arange(self.num_tokens)
        if self.num_outputs == self.num_tokens and torch.equal(self.output_index, identity):
            in_order = len(self.blocks) == 1
            return AttentionPlan([replace(blocks, in_order=in_order) for blocks in self.blocks], None)
        return AttentionPlan(self.blocks, self.output_index)


def causal_plan(ordinal: Int[Tensor, " tokens"]) -> AttentionPlan:
    """Causal attention inside each run of equal ordinals (a sentence, or a document)."""
    builder = PlanBuilder(len(ordinal))
    builder.add_causal(None, ordinal)
    return builder.build()


def sentence_plan(
    tokens: TokenStructure,
    rule: VisibilityRule,
    document: Int[Tensor, " tokens"],
    sentence: Int[Tensor, " tokens"],
    *,
    recent: int = 0,
) -> AttentionPlan:
    """Each sentence's tokens read the ends of earlier sentences of its document, and their own as `rule` says.

    `document` and `sentence` number the runs of the flat list; `recent` sentences before are gathered too.
    Where the rule's ends read ends alone, they attend causally among themselves, apart from the blocks.
    """
    builder = PlanBuilder(len(tokens))
    end_index = tokens.is_end.nonzero().squeeze(1)
    in_blocks = torch.arange(len(tokens))
    if rule.ends_suffice:
        builder.add_causal(end_index, document[end_index])
        in_blocks = (~tokens.is_end).nonzero().squeeze(1)
    if len(in_blocks) == 0:
        return builder.build()

    start, length = runs(sentence[in_blocks])
    first = in_blocks[start]
    # The ends that a sentence may read lie side by side in `end_index`: those of its document, before its first token.
    ends_before = tokens.is_end.long().cumsum(0) - tokens.is_end.long()
    document_start, document_length = runs(document)
    ends_start = ends_before[torch.repeat_interleave(document_start, document_length)][first]
    key_start = recent_start(document[first], tokens.sentence[first], start, recent)
    key_length = start + length - key_start
    # Ends of recent sentences are among the near tokens, unless these leave ends out.
    ends_end = ends_before[first if rule.ends_suffice else in_blocks[key_start]]
    for width, members in grouped(length):
        most = int((ends_end - ends_start + key_length)[members].max())
        for part in members.split(max(1, MAX_GATHERED_KEYS // most)):
            num_ends = (ends_end - ends_start)[part]
            ends, ends_valid = padded(ends_start[part], num_ends, int(num_ends.max()))
            own, own_valid = padded(start[part], length[part], width)
            near, near_valid = padded(key_start[part], key_length[part], int(key_length[part].max()))
            query_index = in_blocks[own]
            key_index = torch.cat([end_index[ends] if len(end_index) else ends, in_blocks[near]], dim=1)
            key_valid = torch.cat([ends_valid, near_valid], dim=1)
            query, key = tokens[query_index], tokens[key_index]
            mask = rule.visible(query.map(lambda f: f.unsqueeze(2)), key.map(lambda f: f.unsqueeze(1)))
            # A padded query reads everything: its output is dropped, but a row without keys would be not-a-number.
            mask = (mask & key_valid.unsqueeze(1)) | ~own_valid.unsqueeze(2)
            builder.add(query_index, own_valid, key_index, mask)
    return builder.build()

"""Attention by structure: gather each block's queries and the few keys that they may read, attend, scatter back.

A plan is made once a forward pass and used by every layer of a stage. It costs what the rule makes visible, where a
dense mask costs the square of the text. Blocks of like length share one call, so that padding stays small; linear
layers never see any padding. Plans are for many tokens; `thoughtformer.attention.cached` serves the decode step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "MAX_GATHERED_KEYS",
    "AttentionPlan",
    "Blocks",
    "PlanBuilder",
    "grouped",
    "padded",
    "runs",
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

    def add_read(
        self,
        query_index: Int[Tensor, "blocks queries"],
        valid: Bool[Tensor, "blocks queries"],
        key_index: Int[Tensor, "blocks keys"],
        mask: Bool[Tensor, "blocks queries keys"],
    ) -> None:
        """Blocks of `valid` queries, each over those of the keys that `mask` lets some query read.

        Queries that aren't valid read nothing in `mask`, those that are read something.
        """
        reads = mask.any(dim=1)
        key_order = (~reads).to(torch.int8).argsort(dim=-1, stable=True)
        for num_keys, members in grouped(reads.sum(dim=-1)):
            for part in members.split(max(1, MAX_GATHERED_KEYS // max(num_keys, 1))):
                chosen = key_order[part, :num_keys]
                chosen_mask = mask[part].gather(2, chosen.unsqueeze(1).expand(-1, mask.shape[1], -1))
                # A padded query reads everything: its output is dropped, but without keys it would be not-a-number.
                chosen_mask |= ~valid[part].unsqueeze(2)
                self.add(query_index[part], valid[part], key_index[part].gather(1, chosen), chosen_mask)

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

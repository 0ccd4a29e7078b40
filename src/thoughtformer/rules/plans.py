"""From who may read whom to blocks of gathered keys: for any rule, and shorter ways for those that follow structure.

`plan_of_runs` looks at the whole mask, a part at a time, and gathers for each block of queries what any of them reads;
`masked_plan` is that for rules among tokens, `entries_plan` (`rules/entries.py`) for entries of compressed texts.
The special plans know from structure what that is; docs/log.md says what that saves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.attention.blocks import MAX_GATHERED_KEYS, AttentionPlan, PlanBuilder, grouped, padded, runs
from thoughtformer.rules.structure import TokenStructure, document_ordinal, sentence_ordinal

__all__ = ["BLOCK_QUERIES", "causal_plan", "masked_plan", "plan_of_runs", "recent_start", "sentence_plan"]


#: Queries that share one gather of keys.
BLOCK_QUERIES = 64
#: Elements of a mask that are looked at at once.
MAX_MASK = 1 << 24

#: Whether each query may read each key; fields broadcast against each other.
Visible = Callable[[TokenStructure, TokenStructure], Bool[Tensor, "..."]]


def masked_plan(tokens: TokenStructure, visible: Visible) -> AttentionPlan:
    """Any rule's plan, from its mask, document by document."""

    def reads(
        query: Int[Tensor, "blocks queries"], key: Int[Tensor, "blocks keys"]
    ) -> Bool[Tensor, "blocks queries keys"]:
        return visible(
            tokens[query].map(lambda field: field.unsqueeze(2)), tokens[key].map(lambda field: field.unsqueeze(1))
        )

    return plan_of_runs(*runs(document_ordinal(tokens)), reads)


def plan_of_runs(
    start: Int[Tensor, " runs"],
    length: Int[Tensor, " runs"],
    reads: Callable[[Tensor, Tensor], Bool[Tensor, "blocks queries keys"]],
    *,
    block_queries: int = BLOCK_QUERIES,
) -> AttentionPlan:
    """Attention inside runs that make up the whole: blocks of neighbouring queries, and what any of a block's reads.

    Time grows with the square of a run's length, memory doesn't.

    Args:
        start, length: of each run.
        reads: whether queries, by index, read keys of their run, by index.
        block_queries: of a block, at most.
    """
    builder = PlanBuilder(int(length.sum()))
    for number in length.unique().tolist():
        width = min(block_queries, number)
        places, of_runs = torch.arange(0, number, width), start[length == number]
        first, place = of_runs.repeat_interleave(len(places)), places.repeat(len(of_runs))
        for part in torch.arange(len(first)).split(max(1, MAX_MASK // (width * number))):
            query, is_query = padded((first + place)[part], (number - place[part]).clamp(max=width), width)
            key = first[part, None] + torch.arange(number)
            builder.add_read(query, is_query, key, reads(query, key) & is_query.unsqueeze(2))
    return builder.build()


def causal_plan(ordinal: Int[Tensor, " tokens"]) -> AttentionPlan:
    """Causal attention inside each run of equal ordinals (a sentence, or a document)."""
    builder = PlanBuilder(len(ordinal))
    builder.add_causal(None, ordinal)
    return builder.build()


def recent_start(
    document: Int[Tensor, " runs"], sentence: Int[Tensor, " runs"], start: Int[Tensor, " runs"], recent: int
) -> Int[Tensor, " runs"]:
    """Where the earliest of each run's own and `recent` earlier sentences starts; runs are sentences, in order."""
    if recent == 0:
        return start
    stride = int(sentence.max()) + 1
    place = document * stride + sentence
    return start[torch.searchsorted(place, document * stride + (sentence - recent).clamp(min=0))]


def sentence_plan(
    tokens: TokenStructure, visible: Visible, *, recent: int = 0, block_queries: int = BLOCK_QUERIES
) -> AttentionPlan:
    """The plan of a rule by which tokens read all earlier ends of their document, and others of `recent` sentences.

    A block's queries follow one another in a document. What they may read is found in time that grows with the text's
    length: the ends before the block's first sentence, or the sentence `recent` before that, and all tokens from there.
    Ends that a document starts with, as a text of known sentences does, read all before them: one call does for many.
    """
    document = document_ordinal(tokens)
    if bool(tokens.is_end.all()):  # as in an hourglass's body
        return causal_plan(document)
    builder = PlanBuilder(len(tokens))
    document_start, document_length = runs(document)
    first_token = torch.repeat_interleave(document_start, document_length)
    ends_before = tokens.is_end.long().cumsum(0) - tokens.is_end.long()
    first_end = ends_before[first_token]
    num_inner = torch.arange(len(tokens)) - first_token - (ends_before - first_end)
    leads = tokens.is_end & (num_inner == 0)
    of_document = torch.repeat_interleave(torch.arange(len(document_start)), document_length)
    num_leading = torch.zeros_like(document_start).index_add(0, of_document, leads.long())
    num_leading = torch.where(num_leading > block_queries, num_leading, 0)
    leading = (leads & (num_leading > 0)[of_document]).nonzero().squeeze(1)
    builder.add_causal(leading, document[leading])
    start, length = _blocks(document_start + num_leading, document_length - num_leading, block_queries)
    sentence_start, sentence_length = runs(sentence_ordinal(tokens))
    near_start = recent_start(document[sentence_start], tokens.sentence[sentence_start], sentence_start, recent)
    near_start = torch.repeat_interleave(near_start, sentence_length)[start]
    near_length = start + length - near_start
    # The ends of a document lie side by side in `end_index`.
    end_index = tokens.is_end.nonzero().squeeze(1)
    first_end = first_end[start]
    num_ends = ends_before[near_start] - first_end
    for width, members in grouped(length):
        most = int((num_ends + near_length)[members].max())
        for part in members.split(max(1, MAX_GATHERED_KEYS // most)):
            ends, is_end = padded(first_end[part], num_ends[part], int(num_ends[part].max()))
            near, is_near = padded(near_start[part], near_length[part], int(near_length[part].max()))
            query_index, is_query = padded(start[part], length[part], width)
            key_index = torch.cat([end_index[ends] if len(end_index) else ends, near], dim=1)
            query, key = tokens[query_index], tokens[key_index]
            mask = visible(query.map(lambda f: f.unsqueeze(2)), key.map(lambda f: f.unsqueeze(1)))
            mask &= torch.cat([is_end, is_near], dim=1).unsqueeze(1) & is_query.unsqueeze(2)
            builder.add_read(query_index, is_query, key_index, mask)
    return builder.build()


def _blocks(
    start: Int[Tensor, " runs"], length: Int[Tensor, " runs"], block_queries: int
) -> tuple[Int[Tensor, " blocks"], Int[Tensor, " blocks"]]:
    """Start and length of blocks that cut each run."""
    num_blocks = -(-length // block_queries)
    first = torch.repeat_interleave(start, num_blocks)
    end = torch.repeat_interleave(start + length, num_blocks)
    number = torch.arange(len(first)) - torch.repeat_interleave(num_blocks.cumsum(0) - num_blocks, num_blocks)
    first = first + number * block_queries
    return first, torch.minimum(end - first, torch.tensor(block_queries))

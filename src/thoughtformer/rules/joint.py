"""How tokens attend to their own sentences and to summaries of earlier ones: as masks, and as blocks of sentences."""

from __future__ import annotations

import torch

from thoughtformer.attention.blocks import MAX_GATHERED_KEYS, grouped, padded, runs
from thoughtformer.attention.joint import DenseJointAttention, JointBlocks, JointPlan
from thoughtformer.rules.plans import recent_start
from thoughtformer.rules.sentences import EarlierSentences, OwnSentence
from thoughtformer.rules.structure import TokenStructure

__all__ = ["dense_joint_attention", "joint_plan"]

#: Scores of one head that a call computes at most: 2**22 floats are 16 MiB, held several times over.
MAX_SCORES = 1 << 22


def dense_joint_attention(
    tokens: TokenStructure, summaries: TokenStructure, rule: OwnSentence, summary_rule: EarlierSentences
) -> DenseJointAttention:
    """Masks straight from the rules; rows don't see each other."""
    query = tokens.map(lambda f: f.unsqueeze(1))
    mask = rule.visible(query, tokens.map(lambda f: f.unsqueeze(0)))
    return DenseJointAttention(mask, summary_rule.visible(query, summaries.map(lambda f: f.unsqueeze(0))))


def joint_plan(
    tokens: TokenStructure, summaries: TokenStructure, rule: OwnSentence, summary_rule: EarlierSentences
) -> JointPlan:
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
    summary_start = torch.searchsorted(place, document * stride)
    summary_length = torch.searchsorted(place, document * stride + sentence, right=True) - summary_start

    blocks, output_index, num_outputs = [], torch.full((len(tokens),), -1), 0
    for width, members in grouped(length):
        most = int((key_length + summary_length)[members].max())
        for part in members.split(max(1, min(MAX_GATHERED_KEYS // most, MAX_SCORES // (most * width)))):
            query_index, is_query = padded(start[part], length[part], width)
            key_index, is_key = padded(key_start[part], key_length[part], int(key_length[part].max()))
            summary_index, is_summary = padded(
                summary_start[part], summary_length[part], int(summary_length[part].max())
            )
            query = tokens[query_index].map(lambda f: f.unsqueeze(2))
            mask = rule.visible(query, tokens[key_index].map(lambda f: f.unsqueeze(1)))
            summary_mask = summary_rule.visible(query, summaries[summary_index].map(lambda f: f.unsqueeze(1)))
            # A padded query reads everything: its output is dropped, but without keys it would be not-a-number.
            mask = (mask & is_key.unsqueeze(1)) | ~is_query.unsqueeze(2)
            blocks.append(
                JointBlocks(query_index, key_index, mask, summary_index, summary_mask & is_summary.unsqueeze(1))
            )
            slots = torch.arange(query_index.numel()).view_as(query_index) + num_outputs
            output_index[query_index[is_query]] = slots[is_query]
            num_outputs += query_index.numel()
    assert bool((output_index >= 0).all()), "every token must be a query once"
    return JointPlan(blocks, output_index)

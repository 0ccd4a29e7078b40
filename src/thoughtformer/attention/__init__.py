"""Visibility rules, their masks and plans, rotary positions; each fast path beside its reference."""

from __future__ import annotations

from thoughtformer.attention.gathered import AttentionPlan
from thoughtformer.attention.held import HeldAttention
from thoughtformer.attention.memory import (
    DenseMemoryAttention,
    HeldMemoryAttention,
    MemoryPlan,
    attend_jointly,
    dense_memory_attention,
    memory_plan,
)
from thoughtformer.attention.reference import DenseAttention, dense_mask
from thoughtformer.attention.rotary import rotary_angles, rotate
from thoughtformer.attention.structure import RowCounters, TokenStructure, read_structure, summaries_of, with_summaries
from thoughtformer.attention.visibility import (
    BODY_RULES,
    Causal,
    EarlierSentences,
    OwnSentence,
    TokenRule,
    VisibilityRule,
    body_rule,
)

__all__ = [
    "BODY_RULES",
    "AttentionPlan",
    "Causal",
    "DenseAttention",
    "DenseMemoryAttention",
    "EarlierSentences",
    "HeldAttention",
    "HeldMemoryAttention",
    "MemoryPlan",
    "OwnSentence",
    "RowCounters",
    "TokenRule",
    "TokenStructure",
    "VisibilityRule",
    "attend_jointly",
    "body_rule",
    "dense_mask",
    "dense_memory_attention",
    "memory_plan",
    "read_structure",
    "rotary_angles",
    "rotate",
    "summaries_of",
    "with_summaries",
]

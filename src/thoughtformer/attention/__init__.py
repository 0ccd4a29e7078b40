"""Visibility rules, their masks and plans, rotary positions; each fast path beside its reference."""

from __future__ import annotations

from thoughtformer.attention.gathered import AttentionPlan
from thoughtformer.attention.held import HeldAttention
from thoughtformer.attention.reference import DenseAttention, dense_mask
from thoughtformer.attention.rotary import rotary_angles, rotate
from thoughtformer.attention.structure import RowCounters, TokenStructure, read_structure
from thoughtformer.attention.visibility import BODY_RULES, Causal, OwnSentence, VisibilityRule, body_rule

__all__ = [
    "BODY_RULES",
    "AttentionPlan",
    "Causal",
    "DenseAttention",
    "HeldAttention",
    "OwnSentence",
    "RowCounters",
    "TokenStructure",
    "VisibilityRule",
    "body_rule",
    "dense_mask",
    "read_structure",
    "rotary_angles",
    "rotate",
]

"""How to attend: dense masks, gathered blocks, caches, tokens beside summaries, rotary positions. Knows no rule."""

from __future__ import annotations

from thoughtformer.attention.blocks import AttentionPlan
from thoughtformer.attention.cached import CachedAttention
from thoughtformer.attention.dense import DenseAttention
from thoughtformer.attention.joint import CachedJointAttention, DenseJointAttention, JointPlan, attend_jointly
from thoughtformer.attention.rotary import Rotary, rotate

__all__ = [
    "AttentionPlan",
    "CachedAttention",
    "CachedJointAttention",
    "DenseAttention",
    "DenseJointAttention",
    "JointPlan",
    "Rotary",
    "attend_jointly",
    "rotate",
]

"""Who may read whom: visibility rules, the structure that they go by, and what attention runs by."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from thoughtformer.rules.joint import dense_joint_attention, joint_plan
from thoughtformer.rules.rule import BODY_RULES, BodyRule, TokenRule, VisibilityRule, body_rule, dense_mask
from thoughtformer.rules.sentences import Causal, EarlierSentences, OwnSentence
from thoughtformer.rules.structure import RowCounters, TokenStructure, read_structure, summaries_of, with_summaries

__all__ = [
    "BODY_RULES",
    "BodyRule",
    "Causal",
    "EarlierSentences",
    "OwnSentence",
    "RowCounters",
    "TokenRule",
    "TokenStructure",
    "VisibilityRule",
    "body_rule",
    "dense_joint_attention",
    "dense_mask",
    "joint_plan",
    "read_structure",
    "summaries_of",
    "with_summaries",
]

# Rules register themselves where they are defined: a file here is all that a new one takes.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

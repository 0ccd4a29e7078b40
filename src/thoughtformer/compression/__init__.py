"""Compression of causal LMs that were trained without it: one file a method, one line to switch one on."""

from thoughtformer.compression.adapter import AdapterConfig, SentinelAdapter
from thoughtformer.compression.compress import compress
from thoughtformer.compression.context import Context
from thoughtformer.compression.method import Method
from thoughtformer.compression.methods.attention_matching import AttentionMatching
from thoughtformer.compression.methods.combiner import Combiner
from thoughtformer.compression.methods.expected_attention import ExpectedAttention
from thoughtformer.compression.methods.full import Full
from thoughtformer.compression.methods.h2o import HeavyHitters
from thoughtformer.compression.methods.kvzip import KVzip
from thoughtformer.compression.methods.local import Local
from thoughtformer.compression.methods.lookup import Lookup
from thoughtformer.compression.methods.quantised import Quantised
from thoughtformer.compression.methods.random import RandomEviction
from thoughtformer.compression.methods.scattered import Scattered
from thoughtformer.compression.methods.selection import Selection
from thoughtformer.compression.methods.sentinel import Sentinel
from thoughtformer.compression.methods.sepllm import SepLLM
from thoughtformer.compression.methods.snapkv import SnapKV
from thoughtformer.compression.methods.streaming import StreamingLLM
from thoughtformer.compression.methods.tova import TOVA
from thoughtformer.compression.methods.truncation import Truncation
from thoughtformer.compression.model import CompressedModel
from thoughtformer.compression.policies import (
    ByteBudget,
    Callback,
    EntryBudget,
    EveryTokens,
    Policy,
    RemovedFraction,
    SentenceEnds,
)
from thoughtformer.compression.registry import METHODS

__all__ = [
    "METHODS",
    "TOVA",
    "AdapterConfig",
    "AttentionMatching",
    "ByteBudget",
    "Callback",
    "Combiner",
    "CompressedModel",
    "Context",
    "EntryBudget",
    "EveryTokens",
    "ExpectedAttention",
    "Full",
    "HeavyHitters",
    "KVzip",
    "Local",
    "Lookup",
    "Method",
    "Policy",
    "Quantised",
    "RandomEviction",
    "RemovedFraction",
    "Scattered",
    "SentenceEnds",
    "Sentinel",
    "SentinelAdapter",
    "Selection",
    "SepLLM",
    "SnapKV",
    "StreamingLLM",
    "Truncation",
    "compress",
]

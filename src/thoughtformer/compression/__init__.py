"""Compression of causal LMs that were trained without it: one file a method, one line to switch one on."""

from thoughtformer.compression.adapter import AdapterConfig, SentinelAdapter
from thoughtformer.compression.combiner import Combiner
from thoughtformer.compression.compressed import CompressedModel
from thoughtformer.compression.context import Context
from thoughtformer.compression.evicting import Full, Local, RandomEviction, Scattered, Truncation
from thoughtformer.compression.heavy_hitters import HeavyHitters
from thoughtformer.compression.method import Method, entries_held
from thoughtformer.compression.policies import (
    ByteBudget,
    Callback,
    EntryBudget,
    EveryTokens,
    Policy,
    RemovedFraction,
    SentenceEnds,
)
from thoughtformer.compression.sentinel import Sentinel
from thoughtformer.compression.settings import METHODS
from thoughtformer.compression.streaming import StreamingLLM
from thoughtformer.compression.switch import compress

__all__ = [
    "METHODS",
    "AdapterConfig",
    "ByteBudget",
    "Callback",
    "Combiner",
    "CompressedModel",
    "Context",
    "EntryBudget",
    "EveryTokens",
    "Full",
    "HeavyHitters",
    "Local",
    "Method",
    "Policy",
    "RandomEviction",
    "RemovedFraction",
    "Scattered",
    "Sentinel",
    "SentenceEnds",
    "SentinelAdapter",
    "StreamingLLM",
    "Truncation",
    "compress",
    "entries_held",
]

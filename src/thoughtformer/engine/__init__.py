"""The generation loop, and the sentence store."""

from __future__ import annotations

from thoughtformer.engine.engine import Completion, Engine, StreamEvent, Usage
from thoughtformer.engine.indexing import IndexResult, index_documents
from thoughtformer.engine.store import SentenceStore, StoreStats

__all__ = [
    "Completion",
    "Engine",
    "IndexResult",
    "SentenceStore",
    "StoreStats",
    "StreamEvent",
    "Usage",
    "index_documents",
]

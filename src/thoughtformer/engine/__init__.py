"""The generation loop, its scheduler, and the sentence store."""

from __future__ import annotations

from thoughtformer.engine.engine import Engine
from thoughtformer.engine.indexing import IndexResult, index_documents
from thoughtformer.engine.readers import Reader, reader_of
from thoughtformer.engine.rows import Completion, Row, StreamEvent, Usage
from thoughtformer.engine.scheduler import Limits, Scheduler, SchedulerStats
from thoughtformer.engine.sessions import Session, Sessions
from thoughtformer.engine.store import SentenceStore, StoreStats
from thoughtformer.engine.worker import Worker

__all__ = [
    "Completion",
    "Engine",
    "IndexResult",
    "Limits",
    "Reader",
    "Row",
    "Scheduler",
    "SchedulerStats",
    "SentenceStore",
    "Session",
    "Sessions",
    "StoreStats",
    "StreamEvent",
    "Usage",
    "Worker",
    "index_documents",
    "reader_of",
]

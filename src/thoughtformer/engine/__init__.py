"""The generation loop: requests, who is admitted, the batch, sessions; and what it is given."""

from __future__ import annotations

from thoughtformer.engine.admission import Limits
from thoughtformer.engine.engine import Engine, OpenSession, generate
from thoughtformer.engine.request import Completion, Request, StreamEvent, Usage
from thoughtformer.engine.scheduler import Scheduler, SchedulerStats
from thoughtformer.engine.sessions import Session, Sessions
from thoughtformer.engine.worker import Worker
from thoughtformer.runners.base import Runner
from thoughtformer.runners.opening import runner_of
from thoughtformer.stores.indexing import IndexResult, index_documents
from thoughtformer.stores.sentences import SentenceStore
from thoughtformer.stores.vectors import StoreStats

__all__ = [
    "Completion",
    "Engine",
    "IndexResult",
    "Limits",
    "OpenSession",
    "Runner",
    "Request",
    "Scheduler",
    "SchedulerStats",
    "SentenceStore",
    "Session",
    "Sessions",
    "StoreStats",
    "StreamEvent",
    "Usage",
    "Worker",
    "generate",
    "index_documents",
    "runner_of",
]

"""The generation loop: requests, who is admitted, the batch, sessions; and what it is given."""

from __future__ import annotations

from thoughtformer.engine.admission import Limits
from thoughtformer.engine.engine import Engine, generate
from thoughtformer.engine.request import Completion, StreamEvent, Usage
from thoughtformer.engine.scheduler import Scheduler
from thoughtformer.engine.sessions import Sessions
from thoughtformer.runners.opening import runner_of
from thoughtformer.stores.sentences import SentenceStore

__all__ = [
    "Completion",
    "Engine",
    "Limits",
    "Scheduler",
    "SentenceStore",
    "Sessions",
    "StreamEvent",
    "Usage",
    "generate",
    "runner_of",
]

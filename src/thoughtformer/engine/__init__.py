"""The generation loop."""

from __future__ import annotations

from thoughtformer.engine.engine import Completion, Engine, StreamEvent, Usage

__all__ = ["Completion", "Engine", "StreamEvent", "Usage"]

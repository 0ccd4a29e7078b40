"""A model as the generation loop sees it."""

from __future__ import annotations

from thoughtformer.runners.base import RequestContext, Runner
from thoughtformer.runners.opening import runner_of

__all__ = ["Runner", "RequestContext", "runner_of"]

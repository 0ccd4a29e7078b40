"""A model as the generation loop sees it."""

from __future__ import annotations

from thoughtformer.runners.base import Reader, RequestContext
from thoughtformer.runners.opening import reader_of

__all__ = ["Reader", "RequestContext", "reader_of"]

"""A model as the generation loop sees it."""

from __future__ import annotations

from thoughtformer.runners.base import Reader, RowContext
from thoughtformer.runners.opening import reader_of

__all__ = ["Reader", "RowContext", "reader_of"]

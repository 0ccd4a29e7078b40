"""What a model is worth: bits per byte, perplexities."""

from __future__ import annotations

from thoughtformer.evaluate.bits import (
    BitsReport,
    DocumentBits,
    DocumentScore,
    document_bits,
    score_documents,
    window_sizes,
    windows,
)

__all__ = ["BitsReport", "DocumentBits", "DocumentScore", "document_bits", "score_documents", "window_sizes", "windows"]

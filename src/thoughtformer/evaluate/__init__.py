"""What a model is worth: bits per byte, perplexities."""

from __future__ import annotations

from thoughtformer.evaluate.bits import BitsReport, DocumentScore, score_documents, window_sizes

__all__ = ["BitsReport", "DocumentScore", "score_documents", "window_sizes"]

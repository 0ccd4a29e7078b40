"""How tokens are chosen and shown: sampling, stopping."""

from __future__ import annotations

from thoughtformer.decode.sampling import RowSampler, SamplingParams, row_seed
from thoughtformer.decode.streaming import TextStream

__all__ = ["RowSampler", "SamplingParams", "TextStream", "row_seed"]

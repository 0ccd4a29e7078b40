"""How tokens are chosen and shown: sampling, stopping."""

from __future__ import annotations

from thoughtformer.decode.sampling import RowSampler, SamplingParams
from thoughtformer.decode.streaming import TextStream

__all__ = ["RowSampler", "SamplingParams", "TextStream"]

"""How tokens are chosen, where a text ends, and how it is shown; of logits and ids alone."""

from __future__ import annotations

from thoughtformer.decode.drafting import Drafter
from thoughtformer.decode.ends import Ends, FinishReason, ends_of
from thoughtformer.decode.sampling import RowSampler, SamplingParams, row_seed
from thoughtformer.decode.streaming import TextStream

__all__ = ["Drafter", "Ends", "FinishReason", "RowSampler", "SamplingParams", "TextStream", "ends_of", "row_seed"]

"""How tokens are chosen, where a text ends, and how it is shown; of logits and ids alone."""

from __future__ import annotations

from thoughtformer.sampling.ends import Ends, FinishReason, ends_of
from thoughtformer.sampling.sampler import Sampler, SamplingParams, derived_seed
from thoughtformer.sampling.text_stream import TextStream

__all__ = ["Ends", "FinishReason", "Sampler", "SamplingParams", "TextStream", "derived_seed", "ends_of"]

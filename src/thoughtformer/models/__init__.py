"""GPTHF, with the plain GPT as its uncompressed case."""

from __future__ import annotations

from thoughtformer.models.gpthf.causal_lm import GPTHFForCausalLM
from thoughtformer.models.gpthf.configuration import GPTHFConfig
from thoughtformer.models.gpthf.modeling import GPTHFModel

__all__ = ["GPTHFConfig", "GPTHFForCausalLM", "GPTHFModel"]

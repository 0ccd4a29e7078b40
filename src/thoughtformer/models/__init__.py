"""GPTHF, with the plain GPT as its uncompressed case."""

from __future__ import annotations

from thoughtformer.models.causal_lm import GPTHFForCausalLM
from thoughtformer.models.configuration_gpthf import GPTHFConfig
from thoughtformer.models.modeling_gpthf import GPTHFModel

__all__ = ["GPTHFConfig", "GPTHFForCausalLM", "GPTHFModel"]

"""GPTHF, with the plain GPT as its uncompressed case."""

from __future__ import annotations

from thoughtformer.models.configuration_gpthf import GPTHFConfig
from thoughtformer.models.modeling_gpthf import GPTHFForCausalLM, GPTHFModel

__all__ = ["GPTHFConfig", "GPTHFForCausalLM", "GPTHFModel"]

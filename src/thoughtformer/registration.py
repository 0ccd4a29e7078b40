"""Makes `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` know this project's classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM, GPTHFModel
from thoughtformer.text import SentenceTokenizer

AutoConfig.register(GPTHFConfig.model_type, GPTHFConfig, exist_ok=True)
AutoModel.register(GPTHFConfig, GPTHFModel, exist_ok=True)
AutoModelForCausalLM.register(GPTHFConfig, GPTHFForCausalLM, exist_ok=True)
AutoTokenizer.register(GPTHFConfig, fast_tokenizer_class=SentenceTokenizer, exist_ok=True)

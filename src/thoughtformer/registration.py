"""Makes transformers' Auto classes, and peft's defaults, know this project's classes."""

from __future__ import annotations

from peft.utils import constants as peft_constants
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM, GPTHFModel
from thoughtformer.text import SentenceTokenizer

AutoConfig.register(GPTHFConfig.model_type, GPTHFConfig, exist_ok=True)
AutoModel.register(GPTHFConfig, GPTHFModel, exist_ok=True)
AutoModelForCausalLM.register(GPTHFConfig, GPTHFForCausalLM, exist_ok=True)
AutoTokenizer.register(GPTHFConfig, fast_tokenizer_class=SentenceTokenizer, exist_ok=True)

# What `LoraConfig` and its like change in a GPTHF that they are told nothing of: as in GPT-NeoX, whose projections of
# queries, keys and values are one, too.
for _name, _targets in vars(peft_constants).items():
    if _name.endswith("_TARGET_MODULES_MAPPING") and _targets.get("gpt_neox") == ["query_key_value"]:
        _targets.setdefault(GPTHFConfig.model_type, ["qkv_proj"])

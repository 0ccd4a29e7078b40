"""Lets transformers load this folder: its classes are those of the package thoughtformer."""

try:
    from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM, GPTHFModel
    from thoughtformer.text import SentenceTokenizer
except ImportError as error:
    raise ImportError(
        f"this model and its tokenizer are classes of the package thoughtformer: pip install thoughtformer ({error})"
    ) from error

__all__ = ["GPTHFConfig", "GPTHFForCausalLM", "GPTHFModel", "SentenceTokenizer"]

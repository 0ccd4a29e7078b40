"""What a saved folder carries so that transformers loads it in a process that never imported this package.

`trust_remote_code=True` then runs one small file of ours, which imports thoughtformer, or says how to get it. No
modelling code lies in the folder: it would go its own way from the version that is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["MODEL_AUTO_MAP", "TOKENIZER_AUTO_MAP", "write_hub_file"]

FILE = "modeling_thoughtformer.py"
_MODULE = FILE.removesuffix(".py")
#: For config.json.
MODEL_AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.GPTHFConfig",
    "AutoModel": f"{_MODULE}.GPTHFModel",
    "AutoModelForCausalLM": f"{_MODULE}.GPTHFForCausalLM",
}
#: For tokenizer_config.json: no slow tokenizer, and the fast one.
TOKENIZER_AUTO_MAP = {"AutoTokenizer": [None, f"{_MODULE}.SentenceTokenizer"]}

_SOURCE = '''"""Lets transformers load this folder: its classes are those of the package thoughtformer."""

try:
    from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM, GPTHFModel
    from thoughtformer.text import SentenceTokenizer
except ImportError as error:
    raise ImportError(
        f"this model and its tokenizer are classes of the package thoughtformer: pip install thoughtformer ({error})"
    ) from error

__all__ = ["GPTHFConfig", "GPTHFForCausalLM", "GPTHFModel", "SentenceTokenizer"]
'''


def write_hub_file(folder: str | os.PathLike[str]) -> None:
    """Puts the file beside a configuration or a tokenizer that names it."""
    (Path(folder) / FILE).write_text(_SOURCE, encoding="utf-8")

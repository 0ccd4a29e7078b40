"""Folding the context of language models: exact, cached, measured.

Importing registers the models and the tokenizer with transformers' Auto classes, and has no other effect. The names
below load when first used.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thoughtformer.compression import CompressedModel, Context, compress
    from thoughtformer.decode.speculating import speculate
    from thoughtformer.engine import Completion, Engine, SentenceStore, generate
    from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
    from thoughtformer.models.loading import load
    from thoughtformer.sampling import SamplingParams
    from thoughtformer.text import SentenceTokenizer

__version__ = "0.2.0"

__all__ = [
    "Completion",
    "CompressedModel",
    "Context",
    "Engine",
    "GPTHFConfig",
    "GPTHFForCausalLM",
    "SamplingParams",
    "SentenceStore",
    "SentenceTokenizer",
    "__version__",
    "compress",
    "generate",
    "load",
    "speculate",
]

_HOMES = {
    "Completion": "thoughtformer.engine",
    "CompressedModel": "thoughtformer.compression",
    "Context": "thoughtformer.compression",
    "Engine": "thoughtformer.engine",
    "GPTHFConfig": "thoughtformer.models",
    "GPTHFForCausalLM": "thoughtformer.models",
    "SamplingParams": "thoughtformer.sampling",
    "SentenceStore": "thoughtformer.engine",
    "SentenceTokenizer": "thoughtformer.text",
    "compress": "thoughtformer.compression",
    "generate": "thoughtformer.engine",
    "load": "thoughtformer.models.loading",
    "speculate": "thoughtformer.decode.speculating",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _is_command_line() -> bool:
    """Whether the `thoughtformer` command, or `python -m thoughtformer`, is what imports this package.

    It must answer --help within a second, and transformers takes four to import: its commands import what they need.
    """
    program = getattr(sys, "argv", [""])[0]
    as_module = program == "-m" and "thoughtformer" in sys.orig_argv
    return as_module or Path(program).stem == "thoughtformer"


if not _is_command_line():
    importlib.import_module("thoughtformer.registration")

"""Which runner a model gets."""

from __future__ import annotations

from typing import Any

import torch

from thoughtformer.compression import CompressedModel, compress
from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.runners.base import Runner
from thoughtformer.runners.causal_lm import CausalLMRunner
from thoughtformer.runners.gpthf import GPTHFRunner
from thoughtformer.stores.model_sentences import StoredSentences

__all__ = ["runner_of"]


def runner_of(
    model: Any,
    tokenizer: Any,
    *,
    sentences: StoredSentences | None = None,
    pack: bool = True,
    compile: bool = False,
) -> Runner:
    """The model's runner; arguments as for `Engine`. A causal LM of transformers keeps its whole context.

    Raises:
        InputError: no model, but its name, say.
        UnsupportedError: something that this kind of model can't do.
    """
    if not isinstance(model, (torch.nn.Module, CompressedModel)):
        raise InputError(f"model is {model!r}: load it first: model, tokenizer = thoughtformer.load(name).")
    if isinstance(model, GPTHFForCausalLM):
        return GPTHFRunner(model, tokenizer, sentences=sentences, pack=pack, compile=compile)
    if not isinstance(model, CompressedModel):
        model = compress(model, "full")
    if sentences is not None:
        raise UnsupportedError("a compressed model has no vectors of sentences: leave the store out.")
    if compile:
        raise UnsupportedError("steps of a compressed model can't be compiled: what they read changes its shape.")
    return CausalLMRunner(model, tokenizer)

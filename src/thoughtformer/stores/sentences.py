"""The sentence store as models use it: each has a part of its own in it."""

from __future__ import annotations

from thoughtformer.compression import CompressedModel
from thoughtformer.errors import UnsupportedError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.stores.model_sentences import StoredSentences
from thoughtformer.stores.vectors import VectorStore

__all__ = ["SentenceStore", "storable"]


def storable(model: GPTHFForCausalLM | CompressedModel) -> GPTHFForCausalLM:
    """The model, if it has vectors of sentences; raises `UnsupportedError`. To be asked before a store is made."""
    if not isinstance(model, GPTHFForCausalLM):
        kind = "compressed model" if isinstance(model, CompressedModel) else type(model).__name__
        raise UnsupportedError(f"a sentence store keeps vectors of a GPTHF's encoder; a {kind} has none.")
    _ = model.model.sentence_vector_shape
    return model


class SentenceStore(VectorStore):
    """A folder of sentence vectors, of any number of models; arguments and errors as for `VectorStore`."""

    def of(self, model: GPTHFForCausalLM | CompressedModel, *, is_strict: bool = True) -> StoredSentences:
        """The part of the store that is `model`'s, as the model's forward pass takes it.

        Args:
            is_strict: where the store can't be used, raise `OutputError` or `StoreError`; else its sentences count as
                unknown, which costs time alone, and the log says so.

        Raises:
            UnsupportedError: the model has no vectors of sentences that could be kept.
        """
        return StoredSentences(self, storable(model), is_strict=is_strict)

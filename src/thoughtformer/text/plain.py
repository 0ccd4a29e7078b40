"""Tokenizers that write no sentence ends, as corpora and evaluation take them."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from thoughtformer.errors import TokenizerError
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["PlainTokenizer", "document_tokenizer"]


class _NoSplitter:
    identity = "none"


class PlainTokenizer:
    """Any fast tokenizer of transformers, with what `SentenceTokenizer` offers for whole documents."""

    insert_sentence_ends = False
    max_sentence_tokens = None
    min_sentence_tokens = None
    splitter = _NoSplitter()

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    @property
    def backend_tokenizer(self) -> Any:
        return self.tokenizer.backend_tokenizer

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode_document(self, text: str, *, complete: bool, start: bool = True) -> np.ndarray:
        """The ids of one text, with the tokenizer's own special tokens at its start."""
        # The backend, because the frontend warns of every text longer than a model.
        return np.asarray(self.backend_tokenizer.encode(text, add_special_tokens=start).ids, dtype=np.int64)

    def decode(self, ids: Any) -> str:
        """The text of ids, without special tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def document_tokenizer(tokenizer: PreTrainedTokenizerBase | PlainTokenizer) -> Any:
    """The tokenizer itself if it knows documents, else a view of it that does."""
    if isinstance(tokenizer, SentenceTokenizer | PlainTokenizer):
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerError(f"{type(tokenizer).__name__} has no tokenizer.json: convert it to a fast tokenizer.")
    return PlainTokenizer(tokenizer)

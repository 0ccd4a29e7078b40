"""Tokenizers that write no sentence ends, as corpora and evaluation take them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from thoughtformer.errors import InputError, TokenizerError
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
        # A copy: the file may ask for truncation or padding, which transformers turns off at every call.
        self.backend_tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode_document(self, text: str, *, complete: bool, start: bool = True) -> np.ndarray:
        """The ids of one text, with the tokenizer's own special tokens at its start."""
        # The backend, because the frontend warns of every text longer than a model.
        return np.asarray(self.backend_ids(text, start=start), dtype=np.int64)

    def backend_ids(self, text: str, *, start: bool = False, special_as_text: bool = False) -> list[int]:
        """The ids of a text; special tokens written out in it are what they say, or text.

        Raises:
            InputError: half of a character.
        """
        backend = self.backend_tokenizer
        before, backend.encode_special_tokens = backend.encode_special_tokens, special_as_text
        try:
            return backend.encode(text, add_special_tokens=start).ids
        except TypeError:
            raise InputError("a text holds half of a character (a lone surrogate), which can't be encoded.") from None
        finally:
            backend.encode_special_tokens = before

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

"""Tokenizers that write no sentence ends, as corpora and evaluation take them."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from thoughtformer.errors import InputError, TokenizerError
from thoughtformer.text.markers import Markers
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
        """The ids of one text, with what the tokenizer puts before it, and behind it if it's `complete`.

        What a text starts or ends with itself, written out, isn't put there again.
        """
        before, after = self._around
        ids = self.backend_ids(text)
        if start and ids[: len(before)] != before:
            ids = [*before, *ids]
        if start and complete and ids[len(ids) - len(after) :] != after:
            ids = [*ids, *after]
        return np.asarray(ids, dtype=np.int64)

    @cached_property
    def markers(self) -> Markers:
        """What is a token wherever it's written out."""
        return Markers(self.backend_tokenizer)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer's post-processor puts before a text, and behind it."""
        for text in ("a", *self.backend_tokenizer.get_vocab()):  # some know nothing but words of their own
            num_plain = len(self.backend_tokenizer.encode(text, add_special_tokens=False).ids)
            if num_plain:
                whole = self.backend_tokenizer.encode(text, add_special_tokens=True)
                at = whole.special_tokens_mask.index(0)
                return whole.ids[:at], whole.ids[at + num_plain :]
        return [], []

    def backend_ids(self, text: str) -> list[int]:
        """The ids of a text, to which nothing is added; special tokens written out in it are what they say.

        Raises:
            InputError: half of a character.
        """
        # The backend, because the frontend warns of every text longer than a model.
        try:
            return self.backend_tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InputError("a text holds half of a character (a lone surrogate), which can't be encoded.") from None

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

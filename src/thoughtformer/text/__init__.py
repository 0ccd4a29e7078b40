"""Text to tokens to sentences: the tokenizer, the splitter, corpora and packing."""

from __future__ import annotations

from thoughtformer.text.splitting import SentenceSplitter, SentencexSplitter
from thoughtformer.text.tokenizer import END_OF_SENTENCE, END_OF_TEXT, PADDING, SentenceTokenizer, train_bpe

__all__ = [
    "END_OF_SENTENCE",
    "END_OF_TEXT",
    "PADDING",
    "SentenceSplitter",
    "SentenceTokenizer",
    "SentencexSplitter",
    "train_bpe",
]

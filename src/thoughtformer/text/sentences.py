"""Where sentences end: character offsets from a splitter, and token positions from those.

A sentence ends after its last non-space character, wherever the splitter's own piece ends: sentencex keeps trailing
spaces with a sentence, cuts `\\r\\n` in half and returns bare whitespace as pieces of its own. Only offsets are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Protocol

import numpy as np
import sentencex

__all__ = ["SentenceSplitter", "SentencexSplitter", "insert_ends"]


class SentenceSplitter(Protocol):
    """Splits text into sentences, stably: what is split off stays so whatever text follows, but for the last piece."""

    @property
    def identity(self) -> str:
        """What the splitting depends on; token files are kept by it."""
        ...

    def ends(self, text: str) -> list[int]:
        """The offset just past each sentence's last non-space character, ascending; none for bare whitespace."""
        ...


class SentencexSplitter:
    """Rule-based splitting by sentencex for the language with the given ISO 639 code."""

    def __init__(self, language: str = "en") -> None:
        self.language = language

    @property
    def identity(self) -> str:
        """Library, version and language."""
        return f"sentencex {version('sentencex')} {self.language}"

    def ends(self, text: str) -> list[int]:
        """The offset just past each sentence's last non-space character."""
        ends = []
        for piece in sentencex.get_sentence_boundaries(self.language, text):  # type: ignore[attr-defined]
            start, end = piece["start_index"], piece["end_index"]
            stripped = start + len(text[start:end].rstrip())
            if stripped > start:
                ends.append(stripped)
        return ends


def insert_ends(
    ids: Sequence[int],
    token_offsets: Sequence[tuple[int, int]],
    sentence_ends: Sequence[int],
    *,
    sentence_end_token_id: int,
    max_sentence_tokens: int | None,
    min_sentence_tokens: int | None = None,
    close_last: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids with sentence ends among them, and for each the index of its token in `ids`, -1 for an end.

    An end follows the token that holds its sentence's last non-space character (the last such token, where a character
    spans several). The last sentence stays open unless `close_last`: the model is to close it. A sentence that reaches
    `max_sentence_tokens`, its end included, is closed by force unless the text stops there. One of fewer than
    `min_sentence_tokens` since the last end goes on into the next, unless a complete text ends with it. What comes
    later in a text never changes an end.

    Args:
        ids: plain token ids.
        token_offsets: per token, the characters that it holds (start, past the end).
        sentence_ends: offsets as `SentenceSplitter.ends` gives them.
        sentence_end_token_id: the id to insert.
        max_sentence_tokens: None for no limit.
        min_sentence_tokens: None to keep every sentence apart; as much as the maximum makes blocks of equal length.
        close_last: the text is complete, so its last sentence ends too.
    """
    num_tokens = len(ids)
    after = np.zeros(num_tokens, dtype=bool)
    if num_tokens and len(sentence_ends):
        starts = np.fromiter((start for start, _ in token_offsets), dtype=np.int64, count=num_tokens)
        natural = np.asarray(sentence_ends, dtype=np.int64)
        if not close_last:
            natural = natural[:-1]
        # Tokens' starts never decrease, so the last token that starts at or before a character holds it.
        after[np.searchsorted(starts, natural - 1, side="right") - 1] = True
    if max_sentence_tokens is not None or min_sentence_tokens is not None:
        _even_out(after, min_sentence_tokens or 0, max_sentence_tokens, close_last)
    token_index = np.insert(np.arange(num_tokens), np.flatnonzero(after) + 1, -1)
    with_ends = np.where(token_index < 0, sentence_end_token_id, np.asarray(ids, dtype=np.int64)[token_index])
    return (with_ends, token_index) if num_tokens else (np.zeros(0, np.int64), np.zeros(0, np.int64))


def _even_out(after: np.ndarray, shortest: int, longest: int | None, close_last: bool) -> None:
    """Takes away ends that come too early, and adds some where none comes for too long; in place."""
    last = len(after) - 1
    ends = np.flatnonzero(after).tolist()
    begin = 0
    for end in ends if ends and ends[-1] == last else [*ends, last]:
        if longest is not None:
            # Tokens begin..end are one sentence; one that fills the limit exactly ends there anyway.
            forced = range(begin + longest - 2, end, longest - 1)
            after[forced] = True
            begin += len(forced) * (longest - 1)
        is_end = bool(after[end]) if len(after) else False
        if is_end and end - begin + 2 < shortest and not (close_last and end == ends[-1]):
            after[end] = False
        elif is_end:
            begin = end + 1

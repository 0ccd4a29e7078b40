"""Where context helps: losses by a token's place in its sentence, and by the number of earlier sentences in view."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from thoughtformer.evaluate import DocumentBits
from thoughtformer.text import SentenceTokenizer

__all__ = ["EDGES", "LossProfile", "sentence_places"]

#: Lower edges of the bins: 0, 1, 2, 3-4, 5-8, 9-16, 17-32, 33 and more.
EDGES = (0, 1, 2, 3, 5, 9, 17, 33)


@dataclass(kw_only=True)
class LossProfile:
    """Sums of bits and counts of tokens, sentence ends left out, for each bin of `EDGES`."""

    by_offset: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES))))
    by_earlier: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES))))

    def add(self, document: DocumentBits, offset: np.ndarray, sentence: np.ndarray) -> None:
        """A document's bits; `offset` and `sentence` are of its tokens without sentence ends.

        The plain GPT's tokens are binned by the same sentences, though it doesn't see their ends.
        """
        token = np.cumsum(~document.is_end) - 1  # the token that stands at or before each id
        is_scored = ~document.is_end
        is_scored[0] = False  # nothing predicts a document's start
        number = token[is_scored]
        first_in_view = token[document.window_start[is_scored]]
        earlier = sentence[number] - sentence[first_in_view]
        for sums, key in ((self.by_offset, offset[number]), (self.by_earlier, earlier)):
            bins = np.searchsorted(EDGES, key, side="right") - 1
            sums[0] += np.bincount(bins, document.bits[is_scored], minlength=len(EDGES))
            sums[1] += np.bincount(bins, minlength=len(EDGES))

    def bits_per_token(self) -> dict[str, list[float | None]]:
        """Mean bits of each bin's tokens; None where there are none."""
        return {
            name: [float(bits / count) if count else None for bits, count in getattr(self, name).T]
            for name in ("by_offset", "by_earlier")
        }


def sentence_places(tokenizer: SentenceTokenizer, documents: Iterable[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each document, the offset in its sentence and the sentence's number, of all tokens but sentence ends."""
    places = []
    for document in documents:
        ids = tokenizer.encode_document(document, complete=True)
        is_end = ids == tokenizer.sentence_end_token_id
        closes = is_end.copy()
        closes[0] = True  # the document's start is a sentence of its own
        before = np.concatenate([[0], np.cumsum(closes)[:-1]])
        index = np.arange(len(ids))
        start = np.maximum.accumulate(np.where(np.concatenate([[True], closes[:-1]]), index, 0))
        places.append(((index - start)[~is_end], before[~is_end]))
    return places

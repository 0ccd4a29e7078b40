"""Where context helps: losses by a token's place in its sentence, and by the number of earlier sentences in view."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from thoughtformer.evaluate import DocumentBits, windows
from thoughtformer.text import SentenceTokenizer

__all__ = ["EDGES", "LossProfile", "Places", "sentence_places"]

#: Lower edges of the bins: 0, 1, 2, 3-4, 5-8, 9-16, 17-32, 33 and more.
EDGES = (0, 1, 2, 3, 5, 9, 17, 33)


@dataclass(frozen=True, eq=False, kw_only=True)
class Places:
    """For each token of a document but its start, sentence ends left out.

    Attributes:
        offset: tokens before it in its sentence.
        earlier: sentences before its own in its window, a document's start among them.
    """

    offset: np.ndarray
    earlier: np.ndarray


@dataclass(kw_only=True)
class LossProfile:
    """Sums of bits and counts of tokens, sentence ends left out, for each bin of `EDGES`."""

    by_offset: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES))))
    by_earlier: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES))))

    def add(self, document: DocumentBits, places: Places) -> None:
        """A document's bits. `places` are the same for every model, so that each token falls into one bin for all."""
        bits = document.bits[~document.is_end][1:]  # nothing predicts a document's start
        for sums, key in ((self.by_offset, places.offset), (self.by_earlier, places.earlier)):
            bins = np.searchsorted(EDGES, key, side="right") - 1
            sums[0] += np.bincount(bins, bits, minlength=len(EDGES))
            sums[1] += np.bincount(bins, minlength=len(EDGES))

    def bits_per_token(self) -> dict[str, list[float | None]]:
        """Mean bits of each bin's tokens; None where there are none."""
        return {
            name: [float(bits / count) if count else None for bits, count in getattr(self, name).T]
            for name in ("by_offset", "by_earlier")
        }


def sentence_places(tokenizer: SentenceTokenizer, document: str, *, context_tokens: int) -> Places:
    """The places of a document's tokens, but its start, by a tokenizer that writes sentence ends.

    Windows are those of a model that reads them; a plain GPT's lie a few tokens off.
    """
    ids = tokenizer.encode_document(document, complete=True)
    is_end = ids == tokenizer.sentence_end_token_id
    closes = is_end.copy()
    closes[0] = True  # the document's start is a sentence of its own
    sentence = np.concatenate([[0], np.cumsum(closes)[:-1]])
    index = np.arange(len(ids))
    start = np.maximum.accumulate(np.where(np.concatenate([[True], closes[:-1]]), index, 0))
    window_start = np.zeros(len(ids), dtype=np.int64)
    for first, scored, end in windows(
        ids,
        context_tokens=context_tokens,
        stride_tokens=context_tokens // 2,
        sentence_end_token_id=tokenizer.sentence_end_token_id,
    ):
        window_start[scored:end] = first
    is_token = ~is_end
    is_token[0] = False
    return Places(offset=(index - start)[is_token], earlier=(sentence - sentence[window_start])[is_token])

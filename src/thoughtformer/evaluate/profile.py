"""Where context helps: losses by a token's place in its sentence, by the number of earlier sentences in view, and by
how far back the same pair of tokens was read, which a model that copies from its context does well on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from thoughtformer.evaluate.bits import DocumentBits, windows
from thoughtformer.text import SentenceTokenizer

__all__ = ["BINS", "EDGES", "PROFILES", "LossProfile", "Places", "sentence_places"]

#: Lower edges of the bins.
EDGES = (0, 1, 2, 3, 5, 9, 17, 33)
#: What the bins hold.
BINS = ("0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33+")
#: The profiles, and their bins.
PROFILES = {"by_offset": BINS, "by_earlier": BINS, "by_repeat": (*BINS, "new")}


@dataclass(frozen=True, eq=False, kw_only=True)
class Places:
    """For each token of a document but its start, sentence ends left out.

    Attributes:
        offset: tokens before it in its sentence.
        earlier: sentences before its own in its window, a document's start among them.
        repeat: sentences since the token last followed the one that it follows here, in its window; -1 for never.
    """

    offset: np.ndarray
    earlier: np.ndarray
    repeat: np.ndarray


@dataclass(kw_only=True)
class LossProfile:
    """Sums of bits and counts of tokens, sentence ends left out, for each bin of `EDGES`.

    `by_repeat` has one more, for pairs of tokens that are new.
    """

    by_offset: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES))))
    by_earlier: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES))))
    by_repeat: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES) + 1)))

    def add(self, document: DocumentBits, places: Places) -> None:
        """A document's bits. `places` are the same for every model, so that each token falls into one bin for all."""
        bits = document.bits[~document.is_end][1:]  # nothing predicts a document's start
        of_repeat = np.where(places.repeat < 0, len(EDGES), _bins(places.repeat))
        for sums, bins in (
            (self.by_offset, _bins(places.offset)),
            (self.by_earlier, _bins(places.earlier)),
            (self.by_repeat, of_repeat),
        ):
            sums[0] += np.bincount(bins, bits, minlength=sums.shape[1])
            sums[1] += np.bincount(bins, minlength=sums.shape[1])

    def bits_per_token(self) -> dict[str, list[float | None]]:
        """Mean bits of each bin's tokens; None where there are none."""
        return {
            name: [float(bits / count) if count else None for bits, count in getattr(self, name).T] for name in PROFILES
        }


def _bins(counts: np.ndarray) -> np.ndarray:
    return np.searchsorted(EDGES, counts, side="right") - 1


def sentence_places(
    tokenizer: SentenceTokenizer, document: str, *, context_tokens: int, stride_tokens: int | None = None
) -> Places:
    """The places of a document's tokens, but its start, by a tokenizer that writes sentence ends.

    Windows are those of a model that reads them, half of each new by default; a plain GPT's lie a few tokens off.
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
        stride_tokens=stride_tokens if stride_tokens is not None else context_tokens // 2,
        sentence_end_token_id=tokenizer.sentence_end_token_id,
    ):
        window_start[scored:end] = first
    first_sentence = sentence[window_start][~is_end]
    is_token = ~is_end
    is_token[0] = False
    sentence, window_start = sentence[~is_end], window_start[~is_end]
    return Places(
        offset=(index - start)[is_token],
        earlier=(sentence - first_sentence)[1:],
        repeat=_repeats(ids[~is_end], sentence, index[~is_end], window_start),
    )


def _repeats(ids: np.ndarray, sentence: np.ndarray, index: np.ndarray, window_start: np.ndarray) -> np.ndarray:
    """Sentences since each token but the first last followed the same token, no earlier than its window starts."""
    last: dict[tuple[int, int], int] = {}
    found = np.full(len(ids) - 1, -1, dtype=np.int64)
    for place, pair in enumerate(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True), start=1):
        before = last.get(pair)
        if before is not None and index[before - 1] >= window_start[place]:
            found[place - 1] = sentence[place] - sentence[before]
        last[pair] = place
    return found

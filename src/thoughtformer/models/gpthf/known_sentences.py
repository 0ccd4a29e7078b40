"""Sentences whose encoder vectors are known from before, and so needn't pass the encoder again.

What the encoder makes of a sentence depends on that sentence alone. Where later stages read only that, at the
sentence's end, a vector from an earlier prompt, or another process, does as well as one computed now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.rules import TokenStructure

__all__ = ["KnownSentences", "SentenceSource", "find_known"]


@runtime_checkable
class SentenceSource(Protocol):
    """Remembers encoder vectors of one model's sentences.

    A sentence is the bytes of its token ids, 32 bits each, its end included. A vector has the shape
    `GPTHFModel.sentence_vector_shape`.
    """

    def find(self, sentences: Sequence[bytes]) -> tuple[list[int], Float[Tensor, "found depths summaries hidden"]]:
        """Which sentences are known, by their increasing places in `sentences`, and their vectors."""
        ...

    def add(self, sentences: Sequence[bytes], vectors: Float[Tensor, "sentences depths summaries hidden"]) -> None:
        """Takes up sentences that were not found."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class KnownSentences:
    """The whole sentences of one forward pass of which nothing but the vector is read.

    Attributes:
        source: where they were looked up.
        is_known: tokens of sentences that were found.
        vectors: theirs, in text order.
        missing: sentences that were not found.
        missing_ends: the indices of their ends among the tokens.
    """

    source: SentenceSource
    is_known: Bool[Tensor, " tokens"]
    vectors: Float[Tensor, "found depths summaries hidden"]
    missing: list[bytes]
    missing_ends: Int[Tensor, " missing"]


def find_known(
    source: SentenceSource, input_ids: Int[Tensor, " tokens"], tokens: TokenStructure, passing: Bool[Tensor, " tokens"]
) -> KnownSentences:
    """Looks up the sentences that begin and end among `tokens`, and have no token but their end in `passing`."""
    ends = tokens.is_end.nonzero().squeeze(1)
    starts = ends - tokens.offset[ends]
    row_starts = torch.searchsorted(tokens.row, tokens.row[ends])
    inner = (passing & ~tokens.is_end).long().cumsum(0)
    # The tokens before an end: those up to it less those up to before its start.
    before = torch.where(starts > 0, inner[(starts - 1).clamp(min=0)], 0)
    is_whole = (starts >= row_starts) & (inner[ends] == before)
    starts, ends = starts[is_whole], ends[is_whole]

    ids = input_ids.cpu().numpy().astype(np.int32)
    spans = list(zip(starts.tolist(), (ends + 1).tolist(), strict=True))
    sentences = [ids[start:stop].tobytes() for start, stop in spans]
    found, vectors = source.find(sentences)
    # +1 where a known sentence starts and -1 behind its end: the running sum is 1 inside.
    steps = torch.zeros(len(tokens) + 1, dtype=torch.long)
    steps[starts[found]] += 1
    steps[ends[found] + 1] -= 1
    is_missing = torch.ones(len(sentences), dtype=torch.bool)
    is_missing[found] = False
    missing = is_missing.nonzero().squeeze(1)
    return KnownSentences(
        source=source,
        is_known=steps.cumsum(0)[:-1] > 0,
        vectors=vectors,
        missing=[sentences[number] for number in missing.tolist()],
        missing_ends=ends[missing],
    )

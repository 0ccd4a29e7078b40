"""Filling a sentence store: the encoder reads every sentence of some documents once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.stores.sentences import SentenceStore
from thoughtformer.text import SentenceTokenizer

__all__ = ["IndexResult", "index_documents"]

#: Read at once: enough for large matrix products, and little memory.
BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class IndexResult:
    """What was read, and what came into the store.

    Attributes:
        sentences: of all documents, repeated ones too.
        new_vectors: of different sentences that the store hadn't known; a document's start has one, too.
    """

    documents: int
    tokens: int
    sentences: int
    new_vectors: int


def index_documents(
    model: GPTHFForCausalLM,
    tokenizer: SentenceTokenizer,
    store: SentenceStore,
    documents: Iterable[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[IndexResult], None] | None = None,
) -> IndexResult:
    """Adds the documents' sentences to the store, whole batches at a time; what is done stays done.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        store: takes the sentences up.
        documents: texts of any length.
        batch_tokens: read at once, more only if one sentence has more.
        on_progress: told after each batch.

    Raises:
        UnsupportedError: the model has no vectors of sentences that could be kept.
        OutputError: the store can't be written to.
    """
    source = store.of(model)
    count = tokens = sentences = 0
    waiting: list[np.ndarray] = []

    def result() -> IndexResult:
        return IndexResult(documents=count, tokens=tokens, sentences=sentences, new_vectors=source.added)

    def read() -> None:
        ids = torch.from_numpy(np.concatenate(waiting)).to(model.device)
        model.model.remember_sentences(ids, source)
        waiting.clear()
        if on_progress is not None:
            on_progress(result())

    for document in documents:
        ids = tokenizer.encode_document(document, complete=True)
        count += 1
        tokens += len(ids)
        sentences += int(np.count_nonzero(ids == model.config.sentence_end_token_id))
        is_end = np.isin(ids, [model.config.sentence_end_token_id, model.config.bos_token_id])
        is_end[-1:] = True  # white space at a document's end is in no sentence
        for piece in _pieces(ids, np.flatnonzero(is_end) + 1, batch_tokens):
            if waiting and sum(map(len, waiting)) + len(piece) > batch_tokens:
                read()
            waiting.append(piece)
    if waiting:
        read()
    return result()


def _pieces(ids: np.ndarray, stops: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """The ids in pieces of whole sentences, which stop at `stops`; longer than `most` only if one sentence is."""
    start = 0
    while start < len(ids):
        last = np.searchsorted(stops, start + most, side="right") - 1
        following = np.searchsorted(stops, start, side="right")
        stop = int(stops[max(last, following)])
        yield ids[start:stop]
        start = stop

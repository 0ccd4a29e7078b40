"""Bits per byte of the original text, over whole documents in overlapping windows.

Every token is scored once, in the window that shows it the most context; every byte of a document is counted once.
The bits of sentence ends count, and carry no bytes; an end that the sentence limit forces is certain and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from thoughtformer.errors import ConfigError, CorpusError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.text import SentenceTokenizer

__all__ = ["BitsReport", "DocumentBits", "DocumentScore", "document_bits", "score_documents", "windows"]


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """One document's bits and counts."""

    num_bytes: int
    num_tokens: int
    num_sentence_ends: int
    token_bits: float
    sentence_end_bits: float

    @property
    def bits_per_byte(self) -> float:
        """All bits, those of sentence ends among them, by the text's bytes; 0 where there is no text."""
        return (self.token_bits + self.sentence_end_bits) / max(self.num_bytes, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class DocumentBits:
    """Every token's bits.

    Attributes:
        num_bytes: of the text.
        bits: of each id, shape (ids,); 0 for the first, which nothing predicts.
        is_end: whether it is a sentence end.
    """

    num_bytes: int
    bits: np.ndarray
    is_end: np.ndarray

    def score(self) -> DocumentScore:
        """The document's sums."""
        return DocumentScore(
            num_bytes=self.num_bytes,
            num_tokens=max(int((~self.is_end).sum()) - 1, 0),
            num_sentence_ends=int(self.is_end.sum()),
            token_bits=float(self.bits[~self.is_end].sum()),
            sentence_end_bits=float(self.bits[self.is_end].sum()),
        )


@dataclass(frozen=True, kw_only=True)
class BitsReport:
    """The figures of a whole corpus, and what they depend on.

    Documents without a byte count in `num_documents`, and have no part in means over documents.
    """

    bits_per_byte: float
    document_mean: float
    document_std: float
    document_median: float
    token_perplexity: float
    sentence_end_perplexity: float | None
    bits_of_sentence_ends_fraction: float
    num_documents: int
    num_bytes: int
    num_tokens: int
    num_sentence_ends: int
    context_tokens: int
    stride_tokens: int

    @classmethod
    def from_scores(cls, scores: Iterable[DocumentScore], *, context_tokens: int, stride_tokens: int) -> BitsReport:
        """The sums and spread over documents; raises `CorpusError` if there is no text in them."""
        scores = list(scores)
        if not any(score.num_bytes for score in scores):
            raise CorpusError(
                "no documents to evaluate." if not scores else f"all {len(scores)} documents to evaluate are empty."
            )
        total_bytes, tokens = sum(s.num_bytes for s in scores), sum(s.num_tokens for s in scores)
        ends = sum(s.num_sentence_ends for s in scores)
        token_bits, end_bits = (
            math.fsum(getattr(s, name) for s in scores) for name in ("token_bits", "sentence_end_bits")
        )
        each = np.array([s.bits_per_byte for s in scores if s.num_bytes])
        return cls(
            bits_per_byte=(token_bits + end_bits) / total_bytes,
            document_mean=float(each.mean()),
            document_std=float(each.std(ddof=1)) if len(each) > 1 else 0.0,
            document_median=float(np.median(each)),
            token_perplexity=2 ** (token_bits / tokens),
            sentence_end_perplexity=2 ** (end_bits / ends) if ends else None,
            bits_of_sentence_ends_fraction=end_bits / (token_bits + end_bits) if token_bits + end_bits else 0.0,
            num_documents=len(scores),
            num_bytes=total_bytes,
            num_tokens=tokens,
            num_sentence_ends=ends,
            context_tokens=context_tokens,
            stride_tokens=stride_tokens,
        )


def windows(
    ids: np.ndarray, *, context_tokens: int, stride_tokens: int, sentence_end_token_id: int | None
) -> Iterator[tuple[int, int, int]]:
    """Windows (start, first scored, end) that score every token but the first exactly once.

    A window holds at most `context_tokens` tokens and scores about `stride_tokens` new ones. It starts where a
    sentence does, if one starts in its context, so that no sentence is read without its beginning.
    """
    starts = np.zeros(0, dtype=np.int64)
    if sentence_end_token_id is not None:
        starts = np.flatnonzero(ids == sentence_end_token_id) + 1
    scored = 1
    while scored < len(ids):
        start = max(0, scored - (context_tokens - stride_tokens)) if scored > 1 else 0
        if start > 0:
            following = np.searchsorted(starts, start)
            if following < len(starts) and starts[following] < scored:
                start = int(starts[following])
        end = min(start + context_tokens, len(ids))
        yield start, scored, end
        scored = end


def score_documents(
    model: GPTHFForCausalLM,
    tokenizer: SentenceTokenizer,
    documents: Iterable[str],
    *,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    batch_size: int = 8,
) -> Iterator[DocumentScore]:
    """Each document's score, as soon as it is complete; batches don't change the figures.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        documents: whole texts.
        context_tokens: a window's length; default: what the model was trained for.
        stride_tokens: tokens that a window adds; default: half the window.
        batch_size: windows that share a forward pass.

    Raises:
        ConfigError: a window longer than the model was trained for, or a stride that exceeds it.
    """
    for document in documents:
        yield document_bits(
            model,
            tokenizer,
            document,
            context_tokens=context_tokens,
            stride_tokens=stride_tokens,
            batch_size=batch_size,
        ).score()


def document_bits(
    model: GPTHFForCausalLM,
    tokenizer: SentenceTokenizer,
    document: str,
    *,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    batch_size: int = 8,
) -> DocumentBits:
    """One document's bits, token by token; arguments and errors as in `score_documents`."""
    context_tokens, stride_tokens = window_sizes(model, context_tokens, stride_tokens)
    ids = tokenizer.encode_document(document, complete=True)
    losses = torch.zeros(len(ids), dtype=torch.float64)
    pending: list[tuple[int, int, int]] = []
    for start, scored, end in windows(
        ids,
        context_tokens=context_tokens,
        stride_tokens=stride_tokens,
        sentence_end_token_id=model.config.sentence_end_token_id,
    ):
        pending.append((start, scored, end))
        if len(pending) == batch_size:
            _score(model, ids, pending, losses)
            pending = []
    if pending:
        _score(model, ids, pending, losses)
    return DocumentBits(
        num_bytes=len(document.encode()),
        bits=(losses / math.log(2)).numpy(),
        is_end=ids == model.config.sentence_end_token_id,
    )


def window_sizes(model: GPTHFForCausalLM, context_tokens: int | None, stride_tokens: int | None) -> tuple[int, int]:
    """The window and stride to use; raises `ConfigError` where they can't be."""
    limit: int = model.config.max_position_embeddings
    context_tokens = context_tokens if context_tokens is not None else limit
    stride_tokens = stride_tokens if stride_tokens is not None else max(context_tokens // 2, 1)
    if context_tokens > limit and not model.config.allow_extrapolation:
        raise ConfigError(
            f"context_tokens={context_tokens}, but the model was trained for {limit}. Lower it, or allow extrapolation."
        )
    if context_tokens < 2 or not 1 <= stride_tokens < context_tokens:
        raise ConfigError(
            f"stride_tokens={stride_tokens} must be at least 1 and below context_tokens={context_tokens}, and that "
            "2 or more."
        )
    return context_tokens, stride_tokens


@torch.inference_mode()
def _score(model: GPTHFForCausalLM, ids: np.ndarray, batch: list[tuple[int, int, int]], losses: Tensor) -> None:
    longest = max(end - start for start, _, end in batch)
    input_ids: Int[Tensor, "batch seq"] = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, (start, _, end) in enumerate(batch):
        input_ids[row, : end - start] = torch.from_numpy(ids[start:end])
        mask[row, : end - start] = 1
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)
    output = model(input_ids, attention_mask=mask, labels=input_ids, loss_only=True)
    token_losses = output.token_losses.double().cpu()
    for row, (start, scored, end) in enumerate(batch):
        losses[scored:end] = token_losses[row, scored - start - 1 : end - start - 1]

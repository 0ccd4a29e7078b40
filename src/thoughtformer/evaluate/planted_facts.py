"""What a compressed context still knows: a planted fact's tokens, more likely than without it, by distance.

A text is read in which a fact was planted, and at its end the fact is begun again. Gained is the log-likelihood of
its tokens over that after the same text with another fact in its place. The filler is real text; facts are drawn at
random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thoughtformer.compression.model import CompressedModel
from thoughtformer.errors import CorpusError

__all__ = ["RecallScore", "RecallText", "plant_facts", "score_recall"]

LEAD = " The secret word of the old king was"
REPEAT = " And again: the secret word of the old king was"


@dataclass(frozen=True, kw_only=True)
class RecallText:
    """A text with a fact `distance` tokens before its last tokens, which are the fact's, and the same without it."""

    planted: list[int]
    without: list[int]
    num_asked: int
    distance: int


@dataclass(frozen=True, kw_only=True)
class RecallScore:
    """Gained log-likelihood of the fact's tokens in nats each, with the standard error of the mean over texts."""

    method: str
    removed: float
    distance: int
    gained_nats: float
    standard_error: float
    num_texts: int


def plant_facts(
    fillers: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    distances: Sequence[int],
    context_tokens: int,
    num_asked: int = 4,
    seed: int = 0,
) -> list[RecallText]:
    """One text for each filler and distance.

    Args:
        fillers: ids of at least `context_tokens` tokens of ordinary text each.
        tokenizer: of documents.
        distances: tokens between the planted fact's end and its repetition.
        context_tokens: tokens of each text.
        num_asked: the fact's length; its tokens are words drawn from the fillers.
        seed: of the draw.
    """
    lead, repeat = (_ids(tokenizer, text) for text in (LEAD, REPEAT))
    generator = np.random.default_rng(seed)
    words = [int(token) for filler in fillers for token in filler if _is_word(tokenizer, int(token))]
    texts = []
    for filler in fillers:
        for distance in distances:
            fact = [words[number] for number in generator.integers(0, len(words), num_asked)]
            decoy = [words[number] for number in generator.integers(0, len(words), num_asked)]
            needed = context_tokens - len(lead) - 2 * num_asked - len(repeat)
            before = needed - distance
            if before < 1 or len(filler) < needed:
                raise CorpusError(
                    f"a fact {distance} tokens back doesn't fit into {context_tokens} tokens, or the filler of "
                    f"{len(filler)} tokens is too short."
                )
            start, rest = list(filler[:before]), list(filler[before:needed])
            texts.append(
                RecallText(
                    planted=[*start, *lead, *fact, *rest, *repeat, *fact],
                    without=[*start, *lead, *decoy, *rest, *repeat, *fact],
                    num_asked=num_asked,
                    distance=distance,
                )
            )
    return texts


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode_document(text, complete=False, start=False)]


def _is_word(tokenizer: Any, token: int) -> bool:
    text = tokenizer.decode([token])
    return text.startswith(" ") and text[1:].isalpha() and len(text) > 4


@torch.inference_mode()
def score_recall(
    compressed: CompressedModel, texts: Sequence[RecallText], *, removed: float, batch_size: int = 8
) -> list[RecallScore]:
    """The gain by distance."""
    gains: dict[int, list[float]] = {}
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        with_fact, without = (
            _likelihood(compressed, [getattr(text, name) for text in batch], batch[0].num_asked)
            for name in ("planted", "without")
        )
        for text, gain in zip(batch, (with_fact - without).tolist(), strict=True):
            gains.setdefault(text.distance, []).append(gain)
    return [
        RecallScore(
            method=compressed.method.name,
            removed=removed,
            distance=distance,
            gained_nats=float(np.mean(values)),
            standard_error=float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0,
            num_texts=len(values),
        )
        for distance, values in sorted(gains.items())
    ]


def _likelihood(compressed: CompressedModel, rows: list[list[int]], num_asked: int) -> Tensor:
    """Mean log-likelihood of each row's last tokens."""
    ids = torch.tensor(rows)
    real = torch.ones_like(ids, dtype=torch.bool)
    wanted = torch.zeros_like(real)
    wanted[:, -num_asked - 1 : -1] = True
    hidden = compressed.read(ids, real, None, wanted=wanted)
    logits = compressed.backbone.logits(hidden).float().view(len(rows), num_asked, -1)
    targets = ids[:, -num_asked:].to(logits.device)
    return -F.cross_entropy(logits.mT, targets, reduction="none").mean(dim=1).cpu()

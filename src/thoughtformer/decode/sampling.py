"""How one row chooses its next token: transformers' logits processors, and a random stream of the row's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from thoughtformer.errors import InputError
from thoughtformer.models.penalty import ExemptingRepetitionPenalty

__all__ = ["RowSampler", "SamplingParams"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt.

    Args:
        max_new_tokens: tokens to write at most, sentence ends included.
        temperature: 0 takes the likeliest token; higher values flatten the distribution.
        top_k: choose among the k likeliest; None or 0 for all.
        top_p: choose among the likeliest that together reach this probability (arXiv 1904.09751).
        min_p: drop tokens less likely than this fraction of the likeliest (arXiv 2407.01082).
        repetition_penalty: above 1, tokens already seen become less likely; sentence ends and end of text are spared.
        seed: of this row's random stream; the same seed gives the same text whoever shares the batch.
        stop: the text ends before the first of these strings.
        ignore_end_of_text: never choose the end of text, so that exactly `max_new_tokens` are written: for timing.

    Raises:
        InputError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    ignore_end_of_text: bool = False

    def __post_init__(self) -> None:
        for name, is_valid, needed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature == 0 or self.temperature >= 1e-4, "0 (greedy), or 0.0001 or more"),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("seed", 0 <= self.seed < 1 << 63, "at least 0 and below 2**63"),
        ):
            if not is_valid:
                raise InputError(f"{name}={getattr(self, name)!r} must be {needed}.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"stop={self.stop!r} must be a list of strings, none of them empty.")

    @property
    def is_plain_greedy(self) -> bool:
        """The likeliest token, whatever came before."""
        return self.temperature == 0 and self.repetition_penalty == 1


class RowSampler:
    """Chooses one row's tokens; leaving out the end of text, where asked for, is the caller's part."""

    def __init__(self, params: SamplingParams, exempt: Sequence[int], device: torch.device) -> None:
        self.params = params
        self.generator = torch.Generator(device=device).manual_seed(params.seed)
        self.processors = LogitsProcessorList()
        if params.repetition_penalty != 1:
            self.processors.append(ExemptingRepetitionPenalty(params.repetition_penalty, exempt))
        if params.temperature == 0:
            return
        # transformers' order, so that the same settings give the same distribution as model.generate.
        if params.temperature != 1:
            self.processors.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            self.processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self.processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            self.processors.append(MinPLogitsWarper(params.min_p))

    def scores(self, ids: Sequence[int], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        """The logits after all processors."""
        seen: Int[Tensor, "1 seq"] = torch.tensor([ids], dtype=torch.long, device=logits.device)
        return self.processors(seen, logits[None].clone())[0]  # type: ignore[arg-type]

    def choose(self, ids: Sequence[int], logits: Float[Tensor, " vocab"]) -> int:
        """The next token, given the row's ids so far and the logits (float32, as transformers samples)."""
        scores = self.scores(ids, logits)
        if self.params.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))

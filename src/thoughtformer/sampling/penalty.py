"""Repetition penalty that leaves sentence ends and ends of text alone: they must recur."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

__all__ = ["ExemptingRepetitionPenalty", "exempting_repetition_penalty"]


class ExemptingRepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """transformers' penalty (arXiv 1909.05858), except for the `exempt` ids."""

    def __init__(self, penalty: float, exempt: Sequence[int]) -> None:
        super().__init__(penalty)
        self.exempt = list(exempt)

    def __call__(
        self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        untouched = scores[:, self.exempt].clone()
        processed = super().__call__(input_ids, scores)  # type: ignore[arg-type]
        processed[:, self.exempt] = untouched
        return processed


def exempting_repetition_penalty(processors: LogitsProcessorList, exempt: Sequence[int]) -> LogitsProcessorList:
    """The same processors, repetition penalties made to spare `exempt`."""
    return LogitsProcessorList(
        ExemptingRepetitionPenalty(processor.penalty, exempt)
        if type(processor) is RepetitionPenaltyLogitsProcessor
        else processor
        for processor in processors
    )

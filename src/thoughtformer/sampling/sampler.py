"""How one request chooses its next token: transformers' logits processors, and a random stream of its own."""

from __future__ import annotations

import hashlib
import math
import secrets
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
from thoughtformer.sampling.noise import Noise
from thoughtformer.sampling.penalty import ExemptingRepetitionPenalty

__all__ = ["Chooser", "Sampler", "SamplingParams", "derived_seed"]

#: Below, the quotients of logits leave float32's range before anything but the likeliest token has a chance.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt.

    Args:
        max_new_tokens: tokens to write at most, sentence ends included.
        temperature: 0, as anything below 0.00001, takes the likeliest token; higher values flatten the distribution.
        top_k: choose among the k likeliest; None, 0 or -1 for all.
        top_p: choose among the likeliest that together reach this probability (arXiv 1904.09751); 0: the likeliest.
        min_p: drop tokens less likely than this fraction of the likeliest (arXiv 2407.01082).
        repetition_penalty: above 1, tokens already seen become less likely; sentence ends and end of text are spared.
        seed: of the request's random stream, any integer of 64 bits: the same seed gives the same text, whoever
            shares the batch. None: another stream at every run.
        stop: the text ends before the first of these strings. Text holds no special tokens: a string with one in it
            ends the text at that token.
        stop_token_ids: the text ends at any of these tokens, which aren't shown, as it does at the model's own ends.
        ignore_end_of_text: never choose an end of the model's, so that `max_new_tokens` are written unless `stop` or
            `stop_token_ids` say otherwise.
        fits_room: write fewer than `max_new_tokens` where the model's trained length leaves less room.
        drafts: where the engine drafts, draft for this request, too; the text is the same.
        prediction: text that the answer is expected to repeat, in parts: what an edit begins from, say; drafts copy it.

    Raises:
        InputError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_end_of_text: bool = False
    fits_room: bool = False
    drafts: bool = True
    prediction: str = ""

    def __post_init__(self) -> None:
        for name, is_valid, needed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= -1, "1 or more, or None, 0 or -1 for all"),
            ("top_p", 0 <= self.top_p <= 1, "at least 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("seed", self.seed is None or -(1 << 63) <= self.seed < 1 << 63, "an integer of 64 bits, or None"),
        ):
            if not is_valid:
                raise InputError(f"{name}={getattr(self, name)!r} must be {needed}.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"stop={self.stop!r} must be a list of strings, none of them empty.")
        if isinstance(self.stop_token_ids, str | int) or not all(
            isinstance(token, int) and token >= 0 for token in self.stop_token_ids
        ):
            raise InputError(f"stop_token_ids={self.stop_token_ids!r} must be a list of token ids.")

    @property
    def is_greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature < LEAST_TEMPERATURE or self.top_p == 0

    @property
    def is_plain_greedy(self) -> bool:
        """The likeliest token, whatever came before."""
        return self.is_greedy and self.repetition_penalty == 1


def derived_seed(seed: int, *place: int) -> int:
    """The seed of the prompt at `place` among those that were given `seed` together.

    The first one's is `seed` itself. The others' are digests, because sums would give a prompt the stream of another
    prompt of the next seed's.
    """
    return _digest(f"{seed} at {place}") if any(place) else seed


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class Chooser:
    """Chooses one text's tokens by logits processors.

    Args:
        processors: what makes scores of logits.
        noise: what draws; None: the likeliest is chosen.
        never: ids that are never chosen; `leave_out` is the caller's to call, once for each token.
        reads_ids: a processor looks at the ids so far; else none are handed over, which would take time with each.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        noise: Noise | None,
        *,
        never: Sequence[int] = (),
        reads_ids: bool = True,
    ) -> None:
        self.processors = processors
        self.noise = noise
        self.never = list(never)
        self.reads_ids = reads_ids

    def leave_out(self, logits: Float[Tensor, " vocab"]) -> None:
        """Makes what is never chosen impossible, in place."""
        if self.never:
            logits[self.never] = float("-inf")

    def scores(self, ids: Sequence[int], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        """The logits after all processors."""
        seen: Int[Tensor, "1 seq"] = torch.tensor(
            [ids if self.reads_ids else ids[:0]], dtype=torch.long, device=logits.device
        )
        return self.processors(seen, logits[None].clone())[0]  # type: ignore[arg-type]

    def choose(self, ids: Sequence[int], logits: Float[Tensor, " vocab"]) -> int:
        """The next token, given the ids so far and the logits (float32, as transformers samples)."""
        scores = self.scores(ids, logits)
        return int(scores.argmax()) if self.noise is None else self.noise.draw(scores.softmax(-1))

    def guess(self, ids: Sequence[int], logits: Float[Tensor, " vocab"], ahead: int) -> tuple[int, float]:
        """What it would choose behind `ids`, `ahead` tokens from now, by another model's logits, and how likely it is.

        With the random numbers that will choose that token: what two models agree on, both choose.
        """
        scores = self.scores(ids, logits)
        self.leave_out(scores)
        probabilities = scores.softmax(-1)
        token = int(scores.argmax()) if self.noise is None else self.noise.drawn_ahead(probabilities, ahead)
        return token, float(probabilities[token])


class Sampler(Chooser):
    """Chooses one request's tokens.

    Args:
        params: how.
        exempt: ids that the repetition penalty spares.
        device: of the logits.
        never: ids that are never chosen; `leave_out` is the caller's to call, once for each token.
    """

    def __init__(
        self, params: SamplingParams, exempt: Sequence[int], device: torch.device, *, never: Sequence[int] = ()
    ) -> None:
        self.params = params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        # PyTorch's generator on CPUs looks at 32 bits alone: what they don't hold is folded into them.
        seed = seed if 0 <= seed < 1 << 32 else _digest(str(seed))
        noise = None if params.is_greedy else Noise(torch.Generator(device=device).manual_seed(seed))
        # transformers' warpers look at scores alone.
        super().__init__(LogitsProcessorList(), noise, never=never, reads_ids=params.repetition_penalty != 1)
        if params.repetition_penalty != 1:
            self.processors.append(ExemptingRepetitionPenalty(params.repetition_penalty, exempt))
        if params.is_greedy:
            return
        # transformers' order, so that the same settings give the same distribution as model.generate.
        if params.temperature != 1:
            self.processors.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k is not None and params.top_k > 0:
            self.processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self.processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            self.processors.append(MinPLogitsWarper(params.min_p))

"""A request's random numbers, which can be looked at before they are used."""

from __future__ import annotations

from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Noise"]


class Noise:
    """For each token that is drawn, a vector of exponential variates: the token is argmax(probability / variate).

    `torch.multinomial` draws so, from the same generator: seeds give the texts that they always gave. What draws from
    other probabilities with the same vector mostly draws the same token: where the two differ by a total variation of
    d, at least (1 - d) / (1 + d) of the time (arXiv 2408.07978).

    Args:
        generator: of the numbers; None: torch's own.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self._waiting: deque[Float[Tensor, " vocab"]] = deque()
        self._like: Float[Tensor, " vocab"] | None = None

    def draw(self, probabilities: Float[Tensor, " vocab"]) -> int:
        """The next token. All vectors are of the first probabilities' length and type.

        Raises:
            RuntimeError: these are no probabilities.
        """
        if not bool(probabilities.sum() > 0):
            raise RuntimeError("nothing can be drawn: the probabilities aren't finite, or all of them are zero.")
        if self._like is None:
            self._like = torch.empty_like(probabilities)
        token = self.drawn_ahead(probabilities, 0)
        self._waiting.popleft()
        return token

    def drawn_ahead(self, probabilities: Float[Tensor, " vocab"], ahead: int) -> int:
        """The token that `draw` would give after `ahead` others; before the first `draw`, the likeliest.

        Of these and the probabilities that are drawn from, the ids that both have count.
        """
        if self._like is None:
            return int(probabilities.argmax())
        while len(self._waiting) <= ahead:
            self._waiting.append(torch.empty_like(self._like).exponential_(1, generator=self.generator))
        size = min(len(probabilities), len(self._like))
        return int((probabilities[:size] / self._waiting[ahead][:size].to(probabilities.device)).argmax())

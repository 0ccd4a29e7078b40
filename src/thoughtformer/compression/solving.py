"""Settings by which a method holds a wanted number of entries, so that methods can be compared at equal numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = ["Search", "span_for"]

Kind = TypeVar("Kind")
Setting = TypeVar("Setting")


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is wanted of a method, and ways to look for it.

    Attributes:
        target: entries that a token shall be able to read, on average.
        removed: the fraction of the tokens seen that the others are.
        num_tokens: of the texts.
        mean_entries: what a method that is made comes to, on these texts.
        seed: for methods that draw.
        span_tokens: of methods that fold; None for what suits the fraction.
        trained: what the adapter in use was trained with, for methods with `trained_settings`.
        tokenizer: the texts', for methods that go by what tokens say; None where there is none.
    """

    target: float
    removed: float
    num_tokens: int
    mean_entries: Callable[[Any], float]
    seed: int = 0
    span_tokens: int | None = None
    trained: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None

    @property
    def budgets(self) -> list[int]:
        """Numbers of entries to try, rising."""
        return list(range(6, self.num_tokens + 1))

    @property
    def fractions(self) -> list[float]:
        """Fractions removed to try, falling, so that entries rise."""
        shifted = (self.removed + shift / 1000 for shift in range(40, -51, -1))
        return [fraction for fraction in shifted if 0 <= fraction < 1]

    @property
    def all_fractions(self) -> list[float]:
        """All fractions to try, falling."""
        return [number / 100 for number in range(99, -1, -1)]

    def chunks(self) -> Iterator[int]:
        """Lengths of chunks to try for methods that go by them, best first."""
        return (tokens for tokens in (1024, 256, 64, 16) if tokens <= self.num_tokens // 4)

    def nearest(self, make: Callable[[Setting], Kind], choices: Sequence[Setting]) -> Kind:
        """Of what `make` makes of each choice, that whose mean of entries is nearest to the target."""
        return min(map(make, choices), key=lambda method: abs(self.mean_entries(method) - self.target))

    def crossing(self, make: Callable[[Setting], Kind], choices: Sequence[Setting]) -> Kind:
        """The same where the mean of entries rises with the choices, without trying them all."""
        low, high = 0, len(choices) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.mean_entries(make(choices[middle])) < self.target:
                low = middle
            else:
                high = middle
        return self.nearest(make, choices[max(low - 1, 0) : high + 2])

    def spans(self, num_summaries: int) -> Iterator[int]:
        """Lengths of spans to try for methods that fold, best first."""
        if self.span_tokens is not None:
            lengths = [self.span_tokens]
        else:
            # In short texts whole spans move the mean by more than one per cent: neighbouring lengths do as well.
            wanted = span_for(self.removed, num_summaries, self.num_tokens)
            lengths = [wanted + shift for shift in sorted(range(-8, 9), key=abs)]
        return (length for length in lengths if length > num_summaries)


def span_for(removed: float, num_summaries: int, context_tokens: int) -> int:
    """Tokens a span: the best of some by the bundled adapter's loss (docs/log.md), shorter in short contexts."""
    wanted = max(32.0, 4 * num_summaries / (1 - removed))
    least = max(1.6 * num_summaries / (1 - removed), num_summaries + 1)
    return round(max(min(wanted, context_tokens / 16), least))

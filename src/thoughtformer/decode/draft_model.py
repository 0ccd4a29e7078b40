"""Drafts by a smaller model of the same ids (arXiv 2211.17192, 2302.01318), which chooses with the request's own draws.

Above all a GPTHF for a plain GPT: its step costs the same however long the text is. The ends of sentences that it reads
and writes are its own affair: the text that it is given has none, and neither has what it drafts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.rows import RowsCache
from thoughtformer.checks import check_count
from thoughtformer.decode.drafting import Draft, Drafter, Forecast, Guess
from thoughtformer.decode.translation import Translation, translation_between
from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.models.loading import load
from thoughtformer.runners import Runner, runner_of

__all__ = ["DraftModel"]

#: Drafts that were judged not to pay, after which one is made all the same.
RETRIED = 32
#: Widths of likelihood in which guesses are counted.
WIDTHS = 8


class _Rates:
    """How many guesses were right, by how likely they were by the drafter's own account, and how long one takes.

    Attributes:
        mean: of guesses as they come, how many were right.
        seconds: of one; None: none was made yet.
    """

    #: Guesses that count as made before anything was seen, and what is left of a count after another observation.
    PRIOR, KEPT = 4.0, 0.99
    #: Of guesses of which nothing is known, so many are right. Not as many as their account says: where the same draws
    #: choose, both models choose an unlikely token together more often than each for itself.
    UNKNOWN = 0.6
    #: What is drafted is worth so much at least: it is there, and only what is verified can be counted.
    LEAST = 0.15

    def __init__(self) -> None:
        self._made = [self.PRIOR] * WIDTHS
        self._right = [self.PRIOR * self.UNKNOWN] * WIDTHS
        self.mean = self.UNKNOWN
        self.seconds: float | None = None

    def _width(self, likely: float) -> int:
        return min(int(likely * WIDTHS), WIDTHS - 1)

    def of(self, likely: float) -> float:
        """Of guesses that were about so likely, the share that was right."""
        width = self._width(likely)
        return max(self._right[width] / self._made[width], self.LEAST)

    def add(self, likely: float, was_right: bool) -> None:
        width = self._width(likely)
        self._made[width] = self.KEPT * self._made[width] + 1
        self._right[width] = self.KEPT * self._right[width] + was_right
        self.mean += (1 - self.KEPT) * (was_right - self.mean)

    def took(self, seconds: float) -> None:
        """A guess has been made in so many seconds."""
        self.seconds = seconds if self.seconds is None else self.seconds + 0.1 * (seconds - self.seconds)


class DraftModel(Drafter):
    """Writes on with a smaller model, by the request's own settings and draws.

    Args:
        model: the smaller model, or the name or folder of one.
        tokenizer: its own; None: loaded with the model.
        most_tokens: of a draft.
        pack: as for `Engine`.

    Raises:
        InputError: a model without its tokenizer.
        ConfigError: a setting out of range.
        CheckpointError: no such model.
        UnsupportedError: a model of which nothing can be taken back.
    """

    name = "model"

    def __init__(self, model: Any, tokenizer: Any = None, *, most_tokens: int = 4, pack: bool = True) -> None:
        check_count("most_tokens", most_tokens, 1)
        if tokenizer is None:
            if isinstance(model, torch.nn.Module):
                raise InputError("a model that drafts needs its tokenizer: give DraftModel(model, tokenizer).")
            model, tokenizer = load(model)
        self.runner = runner_of(model, tokenizer, pack=pack)
        if not self.runner.can_speculate:
            raise UnsupportedError(
                f"the method {self.runner.model.method.name!r} overwrites what it drops: a model under it can't draft."
            )
        self.most_tokens = most_tokens
        self.rates = _Rates()
        #: For which ids, and what makes a translation of each text; comparing vocabularies takes long.
        self._bound: tuple[tuple[Any, int | None], Callable[[], Translation]] | None = None

    @classmethod
    def from_argument(cls, argument: str) -> DraftModel:
        if not argument:
            raise InputError("drafts='model' needs a model: write model:NAME, say model:tiny-gpthf.")
        return cls(argument)

    def bound(self, runner: Runner) -> DraftModel:
        if self.runner.model is runner.model:
            raise UnsupportedError("a model that drafts for itself saves nothing: give DraftModel a smaller one.")
        ids = runner.tokenizer, runner.sentence_end
        if self._bound is not None and self._bound[0] == ids:
            return self
        bound = copy.copy(self)
        bound._bound = ids, translation_between(runner, self.runner)
        return bound

    def begin(self, *, client: str = "", prediction: Sequence[int] = (), guess: Guess | None = None) -> _OfRequest:
        assert self._bound is not None
        assert guess is not None
        _, new_translation = self._bound
        return _OfRequest(self, new_translation(), guess)

    def propose(self, ids: Sequence[int], most: int) -> Draft:
        """Refused: how a request chooses isn't known here."""
        raise UnsupportedError("a model drafts for a request: call begin first.")


class _OfRequest(Drafter):
    """One request's: what the model has read of its text."""

    def __init__(self, strategy: DraftModel, translation: Translation, guess: Guess) -> None:
        self.strategy = strategy
        self.runner = strategy.runner
        self.translation = translation
        self.guess = guess
        self.cache: RowsCache | None = None
        #: What the cache has read for good, and behind that.
        self.committed: list[int] = []
        self.pending: list[int] = []
        self.likely: list[float] = []
        self.num_passed_over = 0

    def forecast(self, ids: Sequence[int], most: int) -> Forecast:
        rates, most = self.strategy.rates, self._room(ids, most)
        if rates.seconds is None or self.num_passed_over >= RETRIED:
            return Forecast(survival=[1.0] * most, seconds=0.0)
        return Forecast(survival=[rates.mean**place for place in range(1, most + 1)], seconds=rates.seconds)

    def _room(self, ids: Sequence[int], most: int) -> int:
        """How many tokens can be drafted, of so many."""
        limit, most = self.runner.max_tokens, min(most, self.strategy.most_tokens)
        if limit is not None and 2 * (len(ids) + most) > limit:
            # Behind each token that is drafted a sentence may end.
            most = min(most, (limit - len(self.translation.of(ids))) // 2)
        return max(most, 0)

    @torch.inference_mode()
    def propose(self, ids: Sequence[int], most: int) -> Draft:
        rates, most = self.strategy.rates, self._room(ids, most)
        if not most:
            return Draft(ids=(), survival=())
        drafted: list[int] = []
        survival: list[float] = []
        self.likely = []
        is_first, started, alive = self.cache is None, time.perf_counter(), 1.0
        logits = self._read(self.translation.of(ids))
        # What a whole text takes to be read says nothing of the next draft.
        started = time.perf_counter() if is_first else started
        while True:
            token, likely = self.guess([*ids, *drafted], logits, len(drafted))
            if token in self.translation.silent:
                logits = self._read_on([token])
                continue
            drafted.append(token)
            self.likely.append(likely)
            alive *= rates.of(likely)
            survival.append(alive)
            if len(drafted) == most or token in self.runner.end_ids:
                break
            logits = self._read_on([token])
        rates.took((time.perf_counter() - started) / len(drafted))
        self.num_passed_over = 0
        return Draft(ids=drafted, survival=survival)

    def observe(self, num_verified: int, num_right: int, num_new: int) -> None:
        for place, likely in enumerate(self.likely[: min(num_verified, num_right + 1)]):
            self.strategy.rates.add(likely, place < num_right)
        self.num_passed_over += not self.likely
        self.likely = []

    def _read(self, ids: list[int]) -> Float[Tensor, " vocab"]:
        """Reads a text, or what is new of it: the logits behind it."""
        known, undecided = len(self.committed), max(self.translation.num_undecided, 1)
        if self.cache is None or ids[:known] != self.committed or known >= len(ids):
            # Anew also where an end has come that was taken for impossible.
            self.committed = ids[: max(len(ids) - undecided, 1)]
            self.runner.prepare()
            logits, self.cache, _ = self.runner.read([self.committed], len(ids) + 1)
            self.cache.autocommit = False
            known = len(self.committed)
            if known == len(ids):
                return logits[0]
        else:
            same = 0
            while same < min(len(self.pending), len(ids) - known - 1) and self.pending[same] == ids[known + same]:
                same += 1
            settled = max(min(same, len(ids) - known - undecided), 0)
            self.cache.commit(torch.tensor([settled]))
            self.committed += ids[known : known + settled]
            known += settled
        self.pending = []
        return self._read_on(ids[known:])

    def _read_on(self, ids: list[int]) -> Float[Tensor, " vocab"]:
        assert self.cache is not None
        self.pending += ids
        return self.runner.verify([ids], self.cache)[-1]

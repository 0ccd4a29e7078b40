"""One text in the ids of two models of the same vocabulary, of which one closes sentences and the other may not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from thoughtformer.errors import UnsupportedError
from thoughtformer.runners import Runner
from thoughtformer.sampling import TextStream
from thoughtformer.text import SentenceTokenizer
from thoughtformer.text.sentences import insert_ends
from thoughtformer.text.splitting import SentenceEnd

__all__ = ["Translation", "translation_between"]

#: Characters behind which a sentence that has no end is closed where it was cut.
LONG_TEXT = 2000


class Translation(ABC):
    """Of one text as it grows.

    Attributes:
        silent: ids that say nothing in the other model's words.
        num_undecided: of the last ids, how many may change as the text grows; more may where a text is strange.
    """

    silent: frozenset[int] = frozenset()
    num_undecided: int = 0

    @abstractmethod
    def of(self, ids: Sequence[int]) -> list[int]:
        """The text of `ids`, which begin with those of the last call."""


class _Same(Translation):
    def of(self, ids: Sequence[int]) -> list[int]:
        return list(ids)


class _WithoutEnds(Translation):
    """What closes sentences is left out."""

    def __init__(self, sentence_end: int) -> None:
        self.sentence_end = sentence_end

    def of(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token != self.sentence_end]


class _WithEnds(Translation):
    """Sentences are closed where the tokenizer would close them, had it read the text."""

    num_undecided = 4  # white space and what follows it tell of an end

    def __init__(self, tokenizer: SentenceTokenizer, start_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.start_ids = start_ids
        self.silent = frozenset([tokenizer.sentence_end_token_id])
        #: Of the text up to its last decided end.
        self._closed: list[int] = []
        #: Behind it: ids, their text, and where each ends in that.
        self._open: list[int] = []
        self._stops: list[int] = []
        self._text = ""
        self._ends: Sequence[SentenceEnd] = ()
        self._num_read = 0
        self._stream = TextStream(tokenizer.backend_tokenizer, ())

    # An end is decided by what follows it, so that open ids are read again with each token; a sentence is short.

    def of(self, ids: Sequence[int]) -> list[int]:
        for token in ids[self._num_read :]:
            if token in self.start_ids:
                self._close([*self._open_with_ends(), token], len(self._open))
            else:
                self._open.append(token)
                self._text += self._stream.add(token)
                self._stops.append(len(self._text))
            self._num_read += 1
        with_ends = self._open_with_ends()
        end = self.tokenizer.sentence_end_token_id
        if end in with_ends:
            last = len(with_ends) - with_ends[::-1].index(end)
            gone = len(self._open) - (len(with_ends) - last)
            stop = self._stops[gone - 1]
            # Where a sentence ends by itself, what follows can be told without it. One that was cut goes on.
            is_whole = any(end.place <= stop and not self._text[end.place : stop].strip() for end in self._ends)
            if is_whole or len(self._text) > LONG_TEXT:
                self._close(with_ends[:last], gone)
                with_ends = with_ends[last:]
        return [*self._closed, *with_ends]

    def _open_with_ends(self) -> list[int]:
        tokenizer = self.tokenizer
        self._ends = tokenizer.splitter.decided(self._text)
        ids, _ = insert_ends(
            self._open,
            list(zip([0, *self._stops], self._stops, strict=False)),
            self._ends,
            sentence_end_token_id=tokenizer.sentence_end_token_id,
            max_sentence_tokens=tokenizer.max_sentence_tokens,
            min_sentence_tokens=tokenizer.min_sentence_tokens,
            close_last=False,
        )
        return ids.tolist()

    def _close(self, ids: Sequence[int], gone: int) -> None:
        """These are done with, and so many of the open ones among them."""
        self._closed += ids
        start = self._stops[gone - 1] if gone else 0
        self._open, self._text = self._open[gone:], self._text[start:]
        self._stops = [stop - start for stop in self._stops[gone:]]


def translation_between(target: Runner, drafter: Runner) -> Callable[[], Translation]:
    """What makes a translation of each text, from a model's ids to a drafter's.

    Raises:
        UnsupportedError: the same id isn't the same token in both.
    """
    known, own = (runner.tokenizer.backend_tokenizer.get_vocab() for runner in (target, drafter))
    if known != own:
        differing = next((token for token in own if own[token] != known.get(token)), None)
        differing = next(iter(set(known) - set(own)), "") if differing is None else differing
        raise UnsupportedError(
            f"a model that drafts needs the ids of the one that writes, but {differing!r} is {own.get(differing)} in "
            f"its tokenizer and {known.get(differing)} in the other's: choose a model with the same tokenizer."
        )
    if target.sentence_end == drafter.sentence_end:
        return _Same
    if drafter.sentence_end is None:
        assert target.sentence_end is not None
        return partial(_WithoutEnds, target.sentence_end)
    return partial(_WithEnds, drafter.tokenizer, drafter.start_ids)

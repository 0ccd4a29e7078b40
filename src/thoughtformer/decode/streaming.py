"""A row's text as it grows: whole characters only, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

__all__ = ["TextStream"]

#: How much of what precedes a text is looked at.
CONTEXT_TOKENS = 8
#: What the bytes of a character decode to while some are missing.
INCOMPLETE = "\ufffd"


class TextStream:
    """Turns one row's tokens into text that can be shown at once.

    Args:
        tokenizer: the backend.
        stop: strings before the first of which the text ends.
        context: ids before the first token: some tokenizers write a word's space only where something precedes it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.ids = list(context[-CONTEXT_TOKENS:])
        # How many tokens have given their text, and from where on they are decoded again with the next.
        self._told, self._from = len(self.ids), 0
        self.decoded = ""
        self.num_shown = 0
        self.is_stopped = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return self.decoded[: self.num_shown]

    def add(self, token: int) -> str:
        """What the token adds to the shown text; "" while a character or a possible stop string is incomplete."""
        self.ids.append(token)
        new = self._untold()
        if not new or new.endswith(INCOMPLETE):
            return ""
        self._from, self._told = self._told, len(self.ids)
        return self._grow(new)

    def _untold(self) -> str:
        """The text of tokens that have given none yet, decoded with those before, which may change how it begins."""
        before = self.tokenizer.decode(self.ids[self._from : self._told], skip_special_tokens=True)
        now = self.tokenizer.decode(self.ids[self._from :], skip_special_tokens=True)
        return now[len(before.rstrip(INCOMPLETE)) :]

    def finish(self) -> str:
        """What was held back, once no more tokens come; an incomplete character shows as U+FFFD."""
        if self.is_stopped:
            return ""
        rest = self._untold()
        shown = self._grow(rest) if rest else ""
        if self.is_stopped:
            return shown
        held_back = self.decoded[self.num_shown :]
        self.num_shown = len(self.decoded)
        return shown + held_back

    def _grow(self, piece: str) -> str:
        self.decoded += piece
        # A stop string may have begun before this piece.
        begin = max(self.num_shown - max(map(len, self.stop), default=0), 0)
        found = [index for stop in self.stop if (index := self.decoded.find(stop, begin)) >= 0]
        if found:
            self.is_stopped = True
            end = max(min(found), self.num_shown)
        else:
            end = len(self.decoded) - self._possible_stop()
        shown = self.decoded[self.num_shown : end]
        self.num_shown = end
        return shown

    def _possible_stop(self) -> int:
        """Length of the longest ending of the text that begins a stop string."""
        longest = 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(self.decoded) - self.num_shown), longest, -1):
                if self.decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest

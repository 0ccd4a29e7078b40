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
        self.num_context = len(self.ids)
        # Tokens that have given text, and from where on they are decoded again with the next.
        self._told, self._from = self.num_context, 0
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
        before = self._decode(self._from, self._told).rstrip(INCOMPLETE)
        now = self._decode(self._from, len(self.ids))
        if len(now) <= len(before) or now.endswith(INCOMPLETE):
            return ""
        self._from, self._told = self._told, len(self.ids)
        return self._grow(now[len(before) :])

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)

    def finish(self) -> str:
        """What was held back, once no more tokens come; an incomplete character shows as U+FFFD."""
        if self.is_stopped:
            return ""
        before = self._decode(0, self.num_context).rstrip(INCOMPLETE)
        rest = self._decode(0, len(self.ids))[len(before) + len(self.decoded) :]
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

"""A request's text as it grows: whole characters only, nothing of a stop string."""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["TextStream"]

#: How much of what precedes a text is looked at.
CONTEXT_TOKENS = 8
#: What stands for bytes that make no character; it is also a character that texts hold.
REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TextStream:
    """Turns one request's tokens into text that can be shown at once, in time linear in its length.

    What is shown adds up to the tokenizer's text of the ids: of a byte-level tokenizer, `decode(ids)`; of others, what
    the ids add to the text of what precedes them. Where bytes of a byte-fallback tokenizer make no character, each
    shows as U+FFFD; `decode` would also take back the characters beside them, which have been shown.

    Args:
        tokenizer: the backend.
        stop: strings before the first of which the text ends.
        context: ids before the first token: some tokenizers write a word's space only where something precedes it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], context: Sequence[int] = ()) -> None:
        self._characters = _characters_of(tokenizer, context)
        self._stops = [_StopString(string) for string in stop]
        self._shown: list[str] = []
        self._held_back = ""
        self.is_stopped = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def add(self, token: int) -> str:
        """What the token adds to the shown text; "" while a character or a possible stop string is incomplete."""
        return "" if self.is_stopped else self._grow(self._characters.add(token))

    def finish(self) -> str:
        """What was held back, once no more tokens come; an incomplete character shows as U+FFFD."""
        if self.is_stopped:
            return ""
        shown = self._grow(self._characters.finish())
        if self.is_stopped:
            return shown
        rest, self._held_back = self._held_back, ""
        self._shown.append(rest)
        return shown + rest

    def _grow(self, piece: str) -> str:
        if not piece:
            return ""
        text, known = self._held_back + piece, len(self._held_back)
        begins = [known + begin for stop in self._stops if (begin := stop.find(piece)) is not None]
        if begins:
            self.is_stopped = True
            end = min(begins)
        else:
            end = len(text) - max((stop.num_matched for stop in self._stops), default=0)
        shown, self._held_back = text[:end], text[end:]
        self._shown.append(shown)
        return shown


class _StopString:
    """Looks for a string in a text that comes in pieces, by Knuth, Morris and Pratt: no character is read twice."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.num_matched = 0
        # For each beginning of the string, how much of the string it also ends with; made as far as needed.
        self._borders = [0]

    def find(self, piece: str) -> int | None:
        """Where the string begins, counted from the piece, once it is complete; negative: in an earlier piece."""
        for at, character in enumerate(piece):
            matched = self._after(self.num_matched, character)
            if matched == len(self.string):
                return at + 1 - matched
            if matched > len(self._borders):
                self._borders.append(self._after(self._borders[-1], self.string[matched - 1]))
            self.num_matched = matched
        return None

    def _after(self, matched: int, character: str) -> int:
        while matched and self.string[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.string[matched] == character)


class _Characters(ABC):
    """Tokens to whole characters."""

    @abstractmethod
    def add(self, token: int) -> str: ...

    @abstractmethod
    def finish(self) -> str: ...


def _characters_of(tokenizer: Tokenizer, context: Sequence[int]) -> _Characters:
    decoder = tokenizer.decoder
    kinds = set() if decoder is None else _kinds(json.loads(decoder.__getstate__()))
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    if kinds == {"ByteLevel"}:
        return _ByteLevelCharacters(tokenizer, special)
    return _PieceCharacters(tokenizer, special, context, has_byte_tokens="ByteFallback" in kinds)


def _kinds(decoder: dict) -> set[str]:
    if decoder["type"] == "Sequence":
        return {kind for one in decoder["decoders"] for kind in _kinds(one)}
    return {decoder["type"]}


class _ByteLevelCharacters(_Characters):
    """Tokens that are bytes: UTF-8, in which what precedes a text changes nothing of it."""

    def __init__(self, tokenizer: Tokenizer, special: set[int]) -> None:
        self.tokenizer = tokenizer
        self.special = special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        written = None if token in self.special else self.tokenizer.id_to_token(token)
        if written is None:
            return ""
        try:
            return self._bytes.decode(bytes(_BYTES[character] for character in written))
        except KeyError:  # an added token, written as it is
            return self._bytes.decode(written.encode())

    def finish(self) -> str:
        return self._bytes.decode(b"", final=True)


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _bytes_of_characters()
assert set(_BYTES) == set(ByteLevel.alphabet())


class _PieceCharacters(_Characters):
    """Tokens that are pieces of text, some of them perhaps single bytes.

    A piece's text is what it adds to that of the tokens before, because words lose their space at a text's start.
    """

    def __init__(
        self, tokenizer: Tokenizer, special: set[int], context: Sequence[int], *, has_byte_tokens: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.special = special
        self.has_byte_tokens = has_byte_tokens
        before = [token for token in context[-CONTEXT_TOKENS:] if token not in special]
        self._before: deque[int] = deque(before, maxlen=CONTEXT_TOKENS)
        self._bytes = b""

    def add(self, token: int) -> str:
        if token in self.special:
            return ""
        written = self.tokenizer.id_to_token(token) or "" if self.has_byte_tokens else ""
        if (byte := _BYTE_TOKEN.fullmatch(written)) is not None:
            self._before.append(token)
            self._bytes += bytes.fromhex(byte[1])
            text = self._complete()
            # A text's first token may lose its space also where that is a byte.
            return self._decoded([token]) if text and len(self._before) == 1 else text
        text = self.finish() + self._added(token)
        self._before.append(token)
        return text

    def _added(self, token: int) -> str:
        before = self._decoded(list(self._before))
        return self._decoded([*self._before, token])[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _complete(self) -> str:
        """The characters that the bytes complete; of broken ones, each byte that can't be part of one any more."""
        text = ""
        while self._bytes:
            try:
                text, self._bytes = text + self._bytes.decode(), b""
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                text, self._bytes = text + REPLACEMENT, self._bytes[1:]
        return text

    def finish(self) -> str:
        text, self._bytes = REPLACEMENT * len(self._bytes), b""
        return text

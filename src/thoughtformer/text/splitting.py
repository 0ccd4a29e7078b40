"""Rules for where sentences end. Each has a number, which is saved with the tokenizer.

Rule 2 decides each end from what precedes it and at most the first character behind the white space that follows, so
that text to come never moves an end: a prompt's ends are those of any text that begins with it. Rule 1, of tokenizers
made before rules had numbers, looks at whole paragraphs: the end of a quotation takes back the ends inside it.

In both, sentencex decides what is an abbreviation. It reads windows of bounded length, in which all white space is
plain: its time grows with the square of unclosed quotes, and it panics at some characters of several bytes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple, Protocol

import sentencex

from thoughtformer.errors import InputError, TokenizerError

__all__ = [
    "NEWEST_RULE",
    "SentenceEnd",
    "SentenceSplitter",
    "SentencexSplitter",
    "WholeParagraphSplitter",
    "splitter_of",
]

#: What new tokenizers split by.
NEWEST_RULE = 2


class SentenceEnd(NamedTuple):
    """One end, by character offsets.

    Attributes:
        place: just past the sentence's last non-space character.
        seen: index of the character that shows it to be an end; the end comes before that one's token, if later.
        unless: index of a character that takes the end back where it is in sight when the end is decided; -1: none.
    """

    place: int
    seen: int
    unless: int = -1


class SentenceSplitter(Protocol):
    """Splits text into sentences, stably: what is split off stays so whatever text follows."""

    @property
    def identity(self) -> str:
        """What the splitting depends on; token files are kept by it."""
        ...

    def ends(self, text: str) -> list[int]:
        """The offset just past each sentence's last non-space character, ascending; none for bare whitespace."""
        ...

    def decided(self, text: str, *, complete: bool = False) -> list[SentenceEnd]:
        """The ends that stay whatever text follows, ascending; of a `complete` text also that of its last sentence."""
        ...


def splitter_of(rule: int, language: str) -> SentenceSplitter:
    """The splitter of a rule's number.

    Raises:
        TokenizerError: a number that this version doesn't know.
    """
    rules = {1: WholeParagraphSplitter, 2: SentencexSplitter}
    if type(rule) is int and rule in rules:
        return rules[rule](language)
    raise TokenizerError(
        f"sentence_rule={rule!r} is none that this version of thoughtformer knows (1, {NEWEST_RULE}): the tokenizer "
        "was made by a later one. Upgrade with pip install -U thoughtformer."
    )


# What rule 2 knows by itself: quotations and brackets, in which no sentence ends.

#: Each opening quote and what closes it, as sentencex pairs them.
QUOTES = {
    '"': '"',
    "“": "”",
    "„": "“",
    "«": "»",
    "»": "«",
    "‹": "›",
    "‘": "’",
    "'": "'",
    "`": "'",
    "《": "》",
    "「": "」",
    "『": "』",
}
OPENING, CLOSING = "([{<（［【", ")]}>）］】"
#: An open quotation or bracket counts for so many characters: one that nothing closes must not swallow a paragraph.
OPEN_CHARACTERS = 800
#: After so many blank lines and no line break between them, lines are paragraphs: a line break ends a sentence at once.
LINES_ARE_PARAGRAPHS = 3
#: sentencex sees so much before a full stop.
WINDOW = 40
#: Longer paragraphs are handed to sentencex in parts by rule 1.
PARAGRAPH_CHARACTERS = 8192

_GOES_ON = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_JOINS = frozenset(",;:/")
_CLOSES = frozenset((*QUOTES.values(), *CLOSING))
_BLANK_LINE = re.compile(r"[^\S\n]*\n[^\S\n]*\n")
_PARAGRAPH_BREAK = re.compile(r"\n\r*\n")  # as sentencex splits
_WHITE = re.compile(r"\s+")
#: What is white space to sentencex and takes several bytes.
_LONG_WHITE = re.compile("[\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_INK = re.compile(r"\S")


class SentencexSplitter:
    """Rule 2, for the language with the given ISO 639 code.

    A sentence ends

    - behind a full stop or the like, and the quotes and brackets that close there, unless sentencex takes it for an
      abbreviation, or a quotation or bracket is still open (for `OPEN_CHARACTERS`, and not where a line ends);
      scripts that write no space there need none;
    - where a blank line follows: within it, as soon as it shows; or at the line break itself, where the last
      `LINES_ARE_PARAGRAPHS` line breaks were blank lines.

    Small letters and digits behind closing quotes, or wherever else sentencex lets a sentence go on before them, take
    an end back, if seen together with the white space. Which characters are like full stops is asked of sentencex.
    """

    def __init__(self, language: str = "en") -> None:
        self.language = language
        self._stops = _stops(language)
        marks = {*self._stops, *QUOTES, *QUOTES.values(), *OPENING, *CLOSING, "\r", "\n"}
        # One class of characters, which is found fast.
        self._matters = re.compile(f"[{re.escape(''.join(sorted(marks)))}]+")

    @property
    def identity(self) -> str:
        """Rule, library, version and language."""
        return f"rule 2, sentencex {version('sentencex')} {self.language}"

    def ends(self, text: str) -> list[int]:
        """The offset just past each sentence's last non-space character, the last sentence's included."""
        found = [end.place for end in self._decided(text) if end.unless < 0]
        last = len(text.rstrip())
        return found if not last or (found and found[-1] == last) else [*found, last]

    def decided(self, text: str, *, complete: bool = False) -> list[SentenceEnd]:
        """The ends that stay whatever text follows.

        An open sentence of a complete text ends behind its white space, because an end before it would have been
        decided by nothing that a prompt shows.
        """
        found = list(self._decided(text))
        if complete and text[found[-1].place if found else 0 :].strip():
            found.append(SentenceEnd(len(text), len(text) - 1))
        return found

    def _decided(self, text: str) -> Iterator[SentenceEnd]:
        closed = ink = num_blank = 0  # up to where sentences have been closed; where the last line begins
        open_marks = _OpenMarks(text)
        for run in self._matters.finditer(text):
            at, run_end = run.span()
            while at < run_end:
                mark = text[at]
                if mark in "\r\n":
                    if at >= ink:
                        place = ink + len(text[ink:at].rstrip())
                        blank = _BLANK_LINE.match(text, at)
                        following = _INK.search(text, at)
                        ink = len(text) if following is None else following.start()
                        if place > closed and (blank is not None or num_blank >= LINES_ARE_PARAGRAPHS):
                            closed = place
                            is_line_enough = num_blank >= LINES_ARE_PARAGRAPHS
                            yield SentenceEnd(place, at if blank is None or is_line_enough else blank.end() - 1)
                        num_blank = 0 if blank is None else num_blank + 1
                        if blank is not None:
                            open_marks.begin_paragraph(ink)
                    at += 1
                    continue
                at += 1
                if mark not in self._stops:
                    open_marks.note(at - 1)
                    continue
                while at < run_end and text[at] in self._stops:
                    at += 1
                stop = at
                while at < run_end and text[at] in _CLOSES:
                    open_marks.note(at)
                    at += 1
                if at == len(text):
                    return  # what follows would show whether a sentence ends here
                if text[at] not in "\r\n" and open_marks.holds(at):
                    continue
                end = self._end(text, max(stop - WINDOW, closed), stop, at)
                if end is not None:
                    closed = at
                    yield end

    def _end(self, text: str, begin: int, stop: int, place: int) -> SentenceEnd | None:
        """The end of what reaches from `begin` to a full stop before `stop`, and quotes that close before `place`."""
        following = text[place]
        closes = text[stop:place]
        if closes and closes[-1] in CLOSING:
            return None  # what is said in brackets doesn't end the sentence around them
        head = text[begin:stop]
        if not following.isspace():
            # 3.5, example.org, "Really?", he said.
            if following in _GOES_ON or following in _JOINS or (closes and not following.isalnum()):
                return None
            return SentenceEnd(place, place) if self._splits(head, _stand_in(following), apart=bool(closes)) else None
        if not self._splits(head, "Zq"):
            return None
        ink = _INK.search(text, place)
        if ink is None or (next_word := _stand_in(ink[0])) == "Zq":
            return SentenceEnd(place, place)
        goes_on = (bool(closes) and ink[0] in _GOES_ON) or not self._splits(head, next_word)
        takes_back = goes_on and text.count("\n", place, ink.start()) < 2  # not at a blank line
        return SentenceEnd(place, place, ink.start() if takes_back else -1)

    def _splits(self, head: str, next_word: str, *, apart: bool = True) -> bool:
        """Whether sentencex ends a sentence between the two."""
        head = _WHITE.sub(" ", head).lstrip()
        pieces = _pieces(self.language, f"{head} {next_word}" if apart else head + next_word)
        return pieces is None or any(end - len(head) in (0, 1) for _, end in pieces[:-1])


class _OpenMarks:
    """The quotation and the bracket that are open at a place of a text; they don't nest, as in sentencex.

    A speech of several paragraphs opens a quotation in each and closes it in the last: the paragraph behind one that
    was left open doesn't count as quotation.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._closer = self._left_open = ""
        self.begin_paragraph(0)

    def begin_paragraph(self, at: int) -> None:
        """A paragraph begins at `at`."""
        self._paragraph = at
        self._quote = self._bracket = at - OPEN_CHARACTERS
        self._closer, self._left_open = "", self._closer

    def holds(self, at: int) -> bool:
        """Whether `at` lies within a quotation or bracket."""
        return at - self._quote < OPEN_CHARACTERS or at - self._bracket < OPEN_CHARACTERS

    def note(self, at: int) -> None:
        """Looks at a quote or bracket."""
        mark = self.text[at]
        if mark in CLOSING:
            self._bracket = at - OPEN_CHARACTERS
        elif mark in OPENING:
            if at - self._bracket >= OPEN_CHARACTERS:
                self._bracket = at
        else:
            self._note_quote(mark, at)

    def _note_quote(self, mark: str, at: int) -> None:
        before, behind = self.text[at - 1 : at], self.text[at + 1 : at + 2]
        opens, closes = mark in QUOTES, mark == self._closer
        if mark in "'’":  # before a word, behind one, or an apostrophe within
            opens = opens and behind.isalnum() and not before.isalnum()
            closes = closes and not behind.isalnum()
        if self._closer and at - self._quote < OPEN_CHARACTERS:
            opens = False
        elif closes and opens:  # too long since it was opened to be sure: is it open still?
            opens = (before.isspace() or at == self._paragraph) and not behind.isspace()
        if opens:
            goes_on = (
                QUOTES[mark] == self._left_open
                and not self.text[self._paragraph : min(at, self._paragraph + 8)].strip()
            )
            self._closer, self._quote = QUOTES[mark], at - OPEN_CHARACTERS if goes_on else at
        elif closes:
            self._closer, self._quote = "", at - OPEN_CHARACTERS


def _stand_in(character: str) -> str:
    """What sentencex is shown for a word of which the first character is known: no word that it knows."""
    if character.isascii() and character.isalpha():
        return "zq" if character.islower() else "Zq"
    return character if character.isalnum() else "Zq"


def _pieces(language: str, text: str) -> list[tuple[int, int]] | None:
    """Where sentencex's pieces start and end; None where it fails."""
    try:
        found = sentencex.get_sentence_boundaries(language, text)  # type: ignore[attr-defined]
    except UnicodeEncodeError as error:
        raise InputError(f"text holds a lone surrogate, which is no character: {error}.") from None
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:  # pyo3's PanicException is no Exception
        return None
    return [(piece["start_index"], piece["end_index"]) for piece in found]


@lru_cache
def _stops(language: str) -> frozenset[str]:
    """What ends a sentence in a language: of all punctuation, what sentencex splits at."""
    asked = [chr(code) for code in range(0x21, 0x20000) if unicodedata.category(chr(code)).startswith("P")]
    # A paragraph for each, of eight characters.
    pieces = _pieces(language, "\n\n".join(f"qu{mark} Zq" for mark in asked)) or ()
    starts = {start for start, _ in pieces}
    return frozenset(mark for index, mark in enumerate(asked) if 8 * index + 4 in starts) or frozenset(".!?")


class WholeParagraphSplitter:
    """Rule 1, kept for tokenizers made by it: sentencex on whole paragraphs, in windows where these are very long."""

    def __init__(self, language: str = "en") -> None:
        self.language = language

    @property
    def identity(self) -> str:
        """Library, version and language."""
        return f"sentencex {version('sentencex')} {self.language}"

    def ends(self, text: str) -> list[int]:
        """The offset just past each sentence's last non-space character."""
        ends = []
        for begin, window in self._windows(_LONG_WHITE.sub(" ", text)):
            for start, end in _pieces(self.language, window) or [(0, len(window))]:
                stripped = begin + start + len(window[start:end].rstrip())
                if stripped > begin + start:
                    ends.append(stripped)
        return ends

    def decided(self, text: str, *, complete: bool = False) -> list[SentenceEnd]:
        """All ends but the last, which more text may move."""
        ends = self.ends(text)
        return [SentenceEnd(end, end - 1) for end in (ends if complete else ends[:-1])]

    def _windows(self, text: str) -> Iterator[tuple[int, str]]:
        """The text whole, or in parts that end with a paragraph, or a sentence, where a paragraph is very long."""
        if max(map(len, _PARAGRAPH_BREAK.split(text))) <= PARAGRAPH_CHARACTERS:
            yield 0, text
            return
        begin = 0
        while len(text) - begin > PARAGRAPH_CHARACTERS:
            window = text[begin : begin + PARAGRAPH_CHARACTERS]
            breaks = [found.end() for found in _PARAGRAPH_BREAK.finditer(window)]
            last = [start for start, _ in _pieces(self.language, window) or ()][-1:] if not breaks else breaks[-1:]
            cut = max([*last, PARAGRAPH_CHARACTERS // 2])
            yield begin, window[:cut]
            begin += cut
        yield begin, text[begin:]

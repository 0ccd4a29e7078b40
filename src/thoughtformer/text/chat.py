"""Messages to ids by a tokenizer's chat template: its role markers are special tokens, what people write is text.

Templates are programs that trim, cut, measure and compare what messages hold. So they are given the messages
themselves, and what they make of them is what is read. Only where a message holds a marker, they are asked once more,
with a stand-in for one character of it: where the stand-ins come out are letters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.text.markers import Marker, Markers
from thoughtformer.text.plain import PlainTokenizer
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["encode_chat"]

Messages = Sequence[Mapping[str, Any]]

#: Characters for private use, of which Unicode has these beside those that fonts take.
STAND_INS = range(0xF0000, 0x10FFFE)
#: Keys of a message that say what it is, which templates compare.
NAMES = ("role", "type")
#: Methods of strings, and filters, by which templates look for what is their first argument.
LOOKS = (
    "count",
    "endswith",
    "find",
    "index",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
)
LOOKS += ("rpartition", "rsplit", "split", "startswith")


def encode_chat(tokenizer: SentenceTokenizer | PlainTokenizer, messages: Messages, *, start: bool = True) -> list[int]:
    """The ids of messages, up to where the assistant is to write.

    They are those of transformers' `apply_chat_template`, but for two things: a special or added token written out in a
    message stays text, and where the tokenizer writes sentence ends, each message's last sentence is closed.

    Args:
        tokenizer: with a chat template, as transformers' `apply_chat_template` takes it.
        messages: each with `role` and `content`; further keys are the template's.
        start: start a document; False to go on with one, after an answer of the assistant's.

    Raises:
        UnsupportedError: the tokenizer has no chat template.
        InputError: the template refuses the messages.
    """
    templates = tokenizer.tokenizer if isinstance(tokenizer, PlainTokenizer) else tokenizer
    if not templates.chat_template:
        raise UnsupportedError(
            "this model's tokenizer has no chat template, which says how messages are written: it wasn't trained on "
            "conversations. Use plain completions."
        )
    try:
        _check_characters(messages)
        if isinstance(tokenizer, PlainTokenizer):
            return _plain_chat(tokenizer, messages, start)
        return _sentence_chat(tokenizer, messages, start)
    except RecursionError:
        raise InputError("a message holds lists or objects nested too deep to be read.") from None


def _plain_chat(tokenizer: PlainTokenizer, messages: Messages, start: bool) -> list[int]:
    markers = tokenizer.markers
    if start:
        strings = list(_strings(messages))
        if not any(markers.find(text) or markers.is_cut_by(text) for text in strings):
            return tokenizer.backend_ids(_rendered(tokenizer.tokenizer, messages))
        chat = _Chat.of(tokenizer.tokenizer, markers, messages)
        return markers.encode(chat.text, chat.real)
    # After an answer: the end of its turn, and no preamble again.
    turn = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
    chat = _Chat.of(tokenizer.tokenizer, markers, [*turn, *messages], spans=(1,))
    if 1 not in chat.spans:
        raise InputError(
            "the chat template leaves out answers that others follow, so that a session can't go on turn by turn: send "
            "all messages, without `session`."
        )
    _, end = chat.spans[1]
    return markers.encode(chat.text[end:], [marker for marker in chat.shifted(end) if marker.start >= 0])


def _sentence_chat(tokenizer: SentenceTokenizer, messages: Messages, start: bool) -> list[int]:
    """The same where each message's last sentence is closed."""
    backend = tokenizer.backend_tokenizer
    # Role markers are to be found; `tokenizer` sets what it needs itself, at every call.
    backend.encode_special_tokens = False
    try:
        markers = Markers(backend)
        chat = _Chat.of(tokenizer, markers, messages, spans=range(len(messages)))
        ids: list[int] = []
        at = 0
        for begin, end in [*sorted(chat.spans.values()), (len(chat.text), len(chat.text))]:
            inside = [marker for marker in chat.shifted(at) if 0 <= marker.start < begin - at]
            backend.encode_special_tokens = False
            ids += markers.encode(chat.text[at:begin], inside)
            ids += _sentences_of(tokenizer, markers, chat.text[begin:end])
            at = end
    finally:
        backend.encode_special_tokens = True
    document_start = tokenizer.start_token_id
    if ids[:1] == [document_start]:
        ids = ids[1:]
    return [document_start, *ids] if start else ids


def _sentences_of(tokenizer: SentenceTokenizer, markers: Markers, content: str) -> list[int]:
    """A message's ids. Special tokens are letters to the tokenizer; others that were added are cut in two for it."""
    ids: list[int] = []
    at = 0
    for marker in markers.find(content):
        if not markers.is_special(marker.token):
            piece = content[at : marker.start + 1]
            ids += tokenizer.encode_document(piece, complete=False, start=False).tolist()
            at = marker.start + 1
    return ids + tokenizer.encode_document(content[at:], complete=True, start=False).tolist()


@dataclass
class _StandIns:
    """One character instead of another of the same text, so that lengths and cuts stay as they are."""

    unused: Iterator[str]
    originals: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def of(self, character: str) -> str:
        """The stand-in for a character of markers."""
        if character not in self.shared:
            self.shared[character] = self.new(character)
        return self.shared[character]

    def new(self, character: str) -> str:
        """One that stands nowhere else."""
        stand_in = next(self.unused)
        self.originals[stand_in] = character
        return stand_in

    def unescaped(self, text: str) -> str:
        """A text with the stand-ins as they are where a template has written JSON in ASCII."""
        if "\\ud" in text:
            for stand_in in self.originals:
                text = text.replace(json.dumps(stand_in)[1:-1], stand_in)
        return text

    def undone(self, text: str) -> str:
        """A text with the characters themselves."""
        return text.translate(str.maketrans(self.originals))


@dataclass
class _Chat:
    """What a template makes of messages.

    Attributes:
        text: as transformers has it.
        real: the markers that the template wrote.
        spans: by a message's number, where its content stands, white space around it included.
    """

    text: str
    real: list[Marker]
    spans: dict[int, tuple[int, int]]

    def shifted(self, by: int) -> list[Marker]:
        """The markers of the text from there on."""
        return [Marker(marker.start - by, marker.end - by, marker.token) for marker in self.real]

    @classmethod
    def of(cls, tokenizer: Any, markers: Markers, messages: Messages, spans: Sequence[int] = ()) -> _Chat:
        """Rendered twice: as the messages are, and with stand-ins; `spans` are wanted of these messages."""
        true = _rendered(tokenizer, messages)
        template = tokenizer.get_chat_template()
        everything = "\0".join([template, true, *_strings(messages)])
        used = set(re.findall(f"[{chr(STAND_INS[0])}-{chr(STAND_INS[-1])}]", everything))
        stand_ins = _StandIns(character for code in STAND_INS if (character := chr(code)) not in used)

        def veiled(text: str, *, cut: bool = True) -> str:
            places = [marker.start + _breaking(text[marker.start : marker.end]) for marker in markers.find(text)]
            if cut and markers.is_cut_by(text):
                places += [0, len(text) - 1]
            characters = list(text) if places else []
            for place in places:
                if characters[place] not in stand_ins.originals:
                    characters[place] = stand_ins.of(characters[place])
            return "".join(characters) if places else text

        shown = [_changed(message, veiled) for message in messages]
        edges: dict[int, tuple[str, str, str]] = {}
        for number in spans:
            content = messages[number].get("content")
            if isinstance(content, str) and content.strip():
                shown[number]["content"], edges[number] = _edged(shown[number]["content"], content, stand_ins)
        try:
            # What the template looks for in messages it has to find with its stand-ins.
            seen = _rendered(tokenizer, shown, _looking_for(template, lambda text: veiled(text, cut=False)))
        except InputError:  # it wants something of a message that the stand-ins hide
            seen = _rendered(tokenizer, shown)
        seen = stand_ins.unescaped(seen)
        text = stand_ins.undone(seen)
        if len(text) == len(true) and all(
            one == other for one, other, place in zip(text, true, seen, strict=True) if place not in stand_ins.originals
        ):
            text = true
        found: dict[int, tuple[int, int]] = {}
        at = 0
        for begin, number in sorted((seen.find(first), number) for number, (first, _, _) in edges.items()):
            _, last, content = edges[number]
            end = seen.find(last, begin) + 1
            if at <= begin < end:
                # White space around is the content's, as far as the template has left it.
                lead, trail = len(content) - len(content.lstrip()), len(content) - len(content.rstrip())
                begin -= lead if text[at:begin].endswith(content[:lead]) else 0
                end += trail if text[end:].startswith(content[len(content) - trail :]) else 0
                found[number] = begin, end
                at = end
        return cls(text, markers.find(seen), found)


def _looking_for(template: str, change: Callable[[str], str]) -> str:
    """A template with what it looks for in messages changed, but not what it writes."""
    tokens = [[kind, value] for _, kind, value in jinja2.Environment().lex(template)]
    solid = [token for token in tokens if token[0] != "whitespace"]
    for before, left, token, right in zip(solid, solid[1:], solid[2:], solid[3:], strict=False):
        is_argument = left[1] == "(" and before[1] in LOOKS
        is_compared = left[1] in ("==", "!=") or right[1] in ("==", "!=", "in", "not")
        if token[0] == "string" and (is_argument or is_compared):
            token[1] = change(token[1])
    return "".join(value for _, value in tokens)


def _edged(shown: str, content: str, stand_ins: _StandIns) -> tuple[str, tuple[str, str, str]]:
    """A content whose first and last characters, white space aside, can be found again."""
    first = len(content) - len(content.lstrip())
    last = len(content.rstrip()) - 1
    begin = stand_ins.new(content[first])
    end = begin if first == last else stand_ins.new(content[last])
    shown = shown[:first] + begin + shown[first + 1 :]
    shown = shown[:last] + end + shown[last + 1 :]
    return shown, (begin, end, content)


def _breaking(marker: str) -> int:
    """The place in a marker where a stand-in breaks it: no letter, if may be, whose case templates may change."""
    return next((place for place, character in enumerate(marker) if not character.isalnum()), 0)


def _strings(value: Any) -> Iterator[str]:
    """All texts in messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in NAMES:
                yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """The same with all texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: inner if name in NAMES else _changed(inner, change) for name, inner in value.items()}
    if isinstance(value, Sequence):
        return [_changed(inner, change) for inner in value]
    return value


def _check_characters(messages: Messages) -> None:
    if any(re.search("[\ud800-\udfff]", text) for text in _strings(messages)):
        raise InputError("a message holds half of a character (a lone surrogate), which can't be encoded.")


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str | None = None) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise InputError(f"the chat template refuses these messages: {error}") from None
    assert isinstance(text, str)
    return text

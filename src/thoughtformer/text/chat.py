"""Messages to ids by a tokenizer's chat template: its role markers are special tokens, what people write is text."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.text.plain import PlainTokenizer
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["encode_chat"]


def encode_chat(
    tokenizer: SentenceTokenizer | PlainTokenizer, messages: Sequence[Mapping[str, str]], *, start: bool = True
) -> list[int]:
    """The ids of messages, up to where the assistant is to write.

    Where the tokenizer writes sentence ends, each message's last sentence is closed. A special token written out in a
    message stays text, whatever the template.

    Args:
        tokenizer: with a chat template, as transformers' `apply_chat_template` takes it.
        messages: each with `role` and `content`.
        start: start a document; False to go on with one.

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
    if isinstance(tokenizer, PlainTokenizer):
        return _plain_chat(tokenizer, messages, start)
    ids: list[int] = []
    for part, number in _parts(tokenizer, messages):
        if number is not None:
            ids += tokenizer.encode_document(messages[number]["content"], complete=True, start=False).tolist()
        elif part:
            ids += _template_ids(tokenizer, part)
    document_start = tokenizer.start_token_id
    if ids[:1] == [document_start]:
        ids = ids[1:]
    return [document_start, *ids] if start else ids


def _plain_chat(tokenizer: PlainTokenizer, messages: Sequence[Mapping[str, str]], start: bool) -> list[int]:
    """The same for tokenizers of transformers: what `apply_chat_template` gives, where no message holds a marker."""
    templates = tokenizer.tokenizer
    if not start:
        # After an answer: the end of its turn, and no preamble again.
        messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}, *messages]
    parts = _parts(templates, messages)
    if not start:
        parts = parts[[number for _, number in parts].index(1) + 1 :]
    added = [str(token) for token in templates.added_tokens_decoder.values()]
    if start and not any(marker in message["content"] for message in messages for marker in added):
        # Whole, because some tokenizers encode a text otherwise at its start.
        return tokenizer.backend_ids(_rendered(templates, messages))
    ids: list[int] = []
    for part, number in parts:
        if number is None:
            ids += tokenizer.backend_ids(part)
            continue
        content, at = messages[number]["content"], 0
        # Those that aren't special would be found all the same: cut behind their first character.
        for marker in re.finditer("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)", content):
            ids += tokenizer.backend_ids(content[at : marker.start() + 1], special_as_text=True)
            at = marker.start() + 1
        ids += tokenizer.backend_ids(content[at:], special_as_text=True)
    return ids


def _parts(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, int | None]]:
    """Pieces of the template's own text, and numbers of messages, in order."""
    # Stand-ins nobody can write into a message, and no template will touch.
    name = secrets.token_hex(8)
    stand_ins = [{**message, "content": f"\ue000{name}:{number}\ue001"} for number, message in enumerate(messages)]
    # Split keeps the captured number of the message in between.
    split = re.split(f"\ue000{name}:(\\d+)\ue001", _rendered(tokenizer, stand_ins))
    parts: list[tuple[str, int | None]] = [
        ("", int(part)) if index % 2 else (part, None) for index, part in enumerate(split)
    ]
    written = sorted(number for _, number in parts if number is not None)
    if written != list(range(len(messages))):
        raise InputError(
            f"the chat template writes messages {written} of {len(messages)}: it leaves some out, or changes them."
        )
    return parts


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise InputError(f"the chat template refuses these messages: {error}") from None
    assert isinstance(text, str)
    return text


def _template_ids(tokenizer: SentenceTokenizer, part: str) -> list[int]:
    """A piece of the template itself: here special tokens are what they say."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False
    try:
        return backend.encode(part, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = True

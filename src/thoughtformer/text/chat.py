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
        specials = [str(token) for token in tokenizer.tokenizer.added_tokens_decoder.values() if token.special]
        if not any(special in message["content"] for message in messages for special in specials):
            # Whole, as transformers encodes it: some tokenizers encode a text otherwise at its start.
            ids = _template_ids(tokenizer, _rendered(templates, messages))
            return ids if start or ids[:1] != [templates.bos_token_id] else ids[1:]
    # Stand-ins nobody can write into a message, and no template will touch.
    name = secrets.token_hex(8)
    stand_ins = [{**message, "content": f"\ue000{name}:{number}\ue001"} for number, message in enumerate(messages)]
    rendered = _rendered(templates, stand_ins)
    ids: list[int] = []
    written: list[int] = []
    # Template and messages in turns: split keeps the captured number of the message in between.
    parts = re.split(f"\ue000{name}:(\\d+)\ue001", rendered)
    for index, part in enumerate(parts):
        if index % 2:
            written.append(int(part))
            content = messages[int(part)]["content"]
            ids += _content_ids(tokenizer, content)
        elif part:
            ids += _template_ids(tokenizer, part)
    if sorted(written) != list(range(len(messages))):
        raise InputError(
            f"the chat template writes messages {sorted(written)} of {len(messages)}: it leaves some out, or changes "
            "them."
        )
    if isinstance(tokenizer, PlainTokenizer):
        return ids if start or ids[:1] != [templates.bos_token_id] else ids[1:]
    document_start = tokenizer.start_token_id
    if ids[:1] == [document_start]:
        ids = ids[1:]
    return [document_start, *ids] if start else ids


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise InputError(f"the chat template refuses these messages: {error}") from None
    assert isinstance(text, str)
    return text


def _content_ids(tokenizer: SentenceTokenizer | PlainTokenizer, content: str) -> list[int]:
    """What somebody wrote: here special tokens are text."""
    if isinstance(tokenizer, SentenceTokenizer):
        return tokenizer.encode_document(content, complete=True, start=False).tolist()
    return _encoded(tokenizer.backend_tokenizer, content, special_as_text=True)


def _template_ids(tokenizer: SentenceTokenizer | PlainTokenizer, part: str) -> list[int]:
    """A piece of the template itself: here special tokens are what they say."""
    return _encoded(tokenizer.backend_tokenizer, part, special_as_text=False)


def _encoded(backend: Any, text: str, *, special_as_text: bool) -> list[int]:
    before, backend.encode_special_tokens = backend.encode_special_tokens, special_as_text
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = before

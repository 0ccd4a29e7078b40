"""Messages to ids by a tokenizer's chat template: its role markers are special tokens, what people write is text."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence

from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["encode_chat"]


def encode_chat(
    tokenizer: SentenceTokenizer, messages: Sequence[Mapping[str, str]], *, start: bool = True
) -> list[int]:
    """The ids of messages, up to where the assistant is to write.

    Each message's last sentence is closed. A special token written out in a message stays text, whatever the template.

    Args:
        tokenizer: with a chat template, as transformers' `apply_chat_template` takes it.
        messages: each with `role` and `content`.
        start: start a document; False to go on with one.

    Raises:
        UnsupportedError: the tokenizer has no chat template.
        InputError: the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UnsupportedError(
            "this model's tokenizer has no chat template, which says how messages are written: it wasn't trained on "
            "conversations. Use plain completions."
        )
    # Stand-ins nobody can write into a message, and no template will touch.
    name = secrets.token_hex(8)
    stand_ins = [{**message, "content": f"\ue000{name}:{number}\ue001"} for number, message in enumerate(messages)]
    try:
        rendered = tokenizer.apply_chat_template(stand_ins, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and raise what they like
        raise InputError(f"the chat template refuses these messages: {error}") from None
    ids: list[int] = []
    written: list[int] = []
    # Template and messages in turns: split keeps the captured number of the message in between.
    parts = re.split(f"\ue000{name}:(\\d+)\ue001", str(rendered))
    for index, part in enumerate(parts):
        if index % 2:
            written.append(int(part))
            content = messages[int(part)]["content"]
            ids += tokenizer.encode_document(content, complete=True, start=False).tolist()
        elif part:
            ids += _template_ids(tokenizer, part)
    if sorted(written) != list(range(len(messages))):
        raise InputError(
            f"the chat template writes messages {sorted(written)} of {len(messages)}: it leaves some out, or changes "
            "them."
        )
    document_start = tokenizer.start_token_id
    if ids[:1] == [document_start]:
        ids = ids[1:]
    return [document_start, *ids] if start else ids


def _template_ids(tokenizer: SentenceTokenizer, part: str) -> list[int]:
    """A piece of the template itself: here special tokens are what they say."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False
    try:
        return backend.encode(part, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = True

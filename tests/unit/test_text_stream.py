"""Streamed text adds up to the decoded text, whatever the tokens; stop strings against a plain search."""

from __future__ import annotations

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from prose import PAGE, tiny_tokenizer
from thoughtformer.sampling import TextStream


@functools.cache
def byte_level() -> Tokenizer:
    return tiny_tokenizer().backend_tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Pieces as of SentencePiece, and every byte."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁sea", "s", "é", "海", "\ufffd"]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> str:
    stream = TextStream(tokenizer, stop)
    shown = "".join([*(stream.add(token) for token in ids), stream.finish()])
    assert stream.text == shown
    return shown


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, byte_level().get_vocab_size() - 1), max_size=40))
def test_byte_level_text_adds_up_to_decode(ids):
    """Any ids: broken characters, special tokens, and ids in the midst of a character among them."""
    assert streamed(byte_level(), ids) == byte_level().decode(ids, skip_special_tokens=True)


@settings(max_examples=400, deadline=None)
@example([" "])
@example([" ", " ", 259])
@example([257, " "])
@given(st.lists(st.one_of(st.integers(257, 263), st.characters(codec="utf-8")), max_size=30))
def test_byte_fallback_text_adds_up_to_decode(parts):
    """Whole characters in bytes, and pieces."""
    ids = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [1 + byte for byte in part.encode()]
    assert streamed(byte_fallback(), ids) == byte_fallback().decode(ids)


@settings(max_examples=300, deadline=None)
@example([33])
@example([33, 33, 200])
@example([200, 33])
@example([256])
@given(st.lists(st.integers(1, 256), max_size=12))
def test_broken_bytes_show_as_one_sign_each_and_take_back_nothing(ids):
    shown = streamed(byte_fallback(), ids)
    # A text's first space is lost, as that of its first word is.
    whole = bytes(token - 1 for token in ids).removeprefix(b" ").decode(errors="surrogateescape")
    assert shown == "".join("\ufffd" if "\udc80" <= character <= "\udcff" else character for character in whole)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from("ab\ufffd"), max_size=30), st.lists(st.text("ab\ufffd", min_size=1, max_size=4)))
def test_stop_strings_end_the_text_where_a_plain_search_does(characters, stops):
    """One character a token: the first stop string to be complete ends the text, at its beginning."""
    tokenizer = byte_fallback()
    ids = [1 + byte for character in characters for byte in character.encode()]
    text, expected = "".join(characters), "".join(characters)
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            expected = text[: min(begins)]
            break
    assert streamed(tokenizer, ids, tuple(stops)) == expected


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte level", "byte fallback"])
def test_what_is_shown_is_never_taken_back(tokenizer):
    ids = tokenizer.encode(PAGE[:300]).ids
    stream, shown = TextStream(tokenizer, ("no such string",)), ""
    for token in ids:
        shown += stream.add(token)
        assert stream.text == shown

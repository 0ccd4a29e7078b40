"""Sentences and tokens: ends where the spec puts them, and text that comes back as it was."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import DataCollatorForLanguageModeling, pipeline

import thoughtformer  # noqa: F401  registers the tokenizer
from prose import PAGE, prose, tiny_pair, tiny_tokenizer
from thoughtformer.errors import ConfigError, CorpusError, InputError, TokenizerError, UnsupportedError
from thoughtformer.sampling import TextStream
from thoughtformer.text import END_OF_SENTENCE, END_OF_TEXT, SentenceTokenizer, SentencexSplitter, train_bpe
from thoughtformer.text.sentences import insert_ends
from thoughtformer.text.splitting import SentenceEnd

END, START = 1, 0
AWKWARD = [
    "",
    " ",
    "\n\n",
    "She ran. He.",
    "One.\r\n\r\nTwo. \n",
    "Mr. Smith met Dr. Jones at 3.14 p.m. He left.",
    f"Literal {END_OF_SENTENCE} and {END_OF_TEXT} stay text. Yes.",
    "Emoji 🤦🏽‍♀️. Next 👩‍👩‍👧. End",
    "日本語です。次の文。終わり",
    "no end here",
    "...!?",
    "a.b.c. d! e? f",
    "\u2028 line separators \u2029 and\u00a0spaces\u3000. Then more.",
    'He said: "Stop." Then he left.',
]


def segments(tokenizer: SentenceTokenizer, text: str) -> list[str]:
    """The text between sentence ends."""
    parts: list[list[int]] = [[]]
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        parts.append([]) if token == END else parts[-1].append(token)
    return [tokenizer.decode(part) for part in parts]


@settings(max_examples=400, deadline=None)
@given(st.text())
def test_text_comes_back(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text)
    assert ids[0] == START
    assert tokenizer.decode(ids) == text
    assert [token for token in ids[1:] if token != END] == tokenizer.plain_ids(text)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([". ", "! ", "\n\n", "\r\n", " ", "Aa", "b", "é", "🤦🏽", "。", "Mr", '"', "("])).map(
        "".join
    )
)
@example("A. \n\n B.")
def test_sentences_come_back_whole(text):
    """Denser in sentence ends than random text."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode_document(text, complete=True)
    assert tokenizer.decode(ids) == text
    assert not ((ids[1:] == END) & (ids[:-1] == END)).any(), "an end follows an end"
    assert not (len(ids) > 1 and ids[1] == END), "an end follows the start"


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_document(text, complete=True)) == text


def test_a_megabyte_comes_back():
    tokenizer, text = tiny_tokenizer(), prose(1_000_000)
    ids = tokenizer.encode_document(text, complete=True)
    assert tokenizer.decode(ids) == text
    assert ids[(ids != END) & (ids != START)].tolist() == tokenizer.plain_ids(text)
    assert (ids == END).sum() > 5_000


def test_ends_follow_the_last_character_of_each_sentence():
    tokenizer = tiny_tokenizer()
    assert segments(tokenizer, "She ran.  He sat!\n\nWho? Nobody") == ["She ran.", "  He sat!", "\n\nWho?", " Nobody"]
    assert segments(tokenizer, "One.\r\n\r\nTwo.") == ["One.", "\r\n\r\nTwo."]


def test_last_sentence_stays_open_unless_text_follows():
    tokenizer = tiny_tokenizer()
    for text in ("She ran.", "She ran", 'She ran."'):
        assert END not in tokenizer(text)["input_ids"]
    for text in ("She ran. \n", "She ran.\n\n", "She ran\n\n"):  # white space behind it shows the end
        assert tokenizer(text)["input_ids"].count(END) == 1
        assert tokenizer(text)["input_ids"][-1] != END
    assert tokenizer("She ran. He")["input_ids"].count(END) == 1


def test_documents_close_their_last_sentence():
    ids = tiny_tokenizer().encode_document("She ran. He sat.", complete=True)
    assert ids[-1] == END
    assert (ids == END).sum() == 2


def test_bare_whitespace_forms_no_sentence():
    assert SentencexSplitter().ends(" \n\n \t\r\n") == []
    assert END not in tiny_tokenizer().encode_document("  \n\n ", complete=True)


def test_end_follows_the_last_token_of_a_split_character():
    """A character may span several tokens; the end comes after the last."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Da 🤦. Und")["input_ids"]
    before = ids[: ids.index(END)]
    assert tokenizer.decode(before) == "Da 🤦."


@pytest.mark.parametrize("limit", [2, 3, 8, 64])
def test_long_sentences_are_closed_by_force(limit):
    tokenizer = SentenceTokenizer.from_backend(tiny_tokenizer().backend_tokenizer, max_sentence_tokens=limit)
    text = prose(2000) + " " + "word " * 100 + ". End. " + "x" * 300
    ids = tokenizer.encode_document(text, complete=True)
    lengths = np.diff(np.flatnonzero(np.concatenate([[True], ids[1:] == END])))
    assert lengths.max() <= limit
    assert tokenizer.decode(ids) == text
    open_prompt = np.array(tokenizer("y" * 300)["input_ids"])
    assert (open_prompt == END).sum() > 0


def decided(num_tokens: int, places: list[int], complete: bool) -> list[SentenceEnd]:
    """Ends behind so many characters, each shown by the next one; that of the text's last only if it is complete."""
    ends = [SentenceEnd(place, place) for place in places if place < num_tokens]
    return [*ends, SentenceEnd(num_tokens, num_tokens - 1)] if complete and num_tokens in places else ends


def test_forced_ends_by_hand():
    def ends(num_tokens: int, natural: list[int], limit: int | None, close_last: bool = False) -> list[int]:
        offsets = [(i, i + 1) for i in range(num_tokens)]
        with_ends, _ = insert_ends(
            list(range(10, 10 + num_tokens)),
            offsets,
            decided(num_tokens, natural, close_last),
            sentence_end_token_id=END,
            max_sentence_tokens=limit,
            close_last=close_last,
            last_ink=num_tokens - 1,
        )
        return [1 if token == END else 0 for token in with_ends]

    assert ends(5, [2, 5], None) == [0, 0, 1, 0, 0, 0]
    assert ends(5, [2, 5], None, close_last=True) == [0, 0, 1, 0, 0, 0, 1]
    assert ends(5, [5], 3) == [0, 0, 1, 0, 0, 1, 0]  # two tokens and an end, twice
    assert ends(4, [4], 3) == [0, 0, 1, 0, 0]  # a full sentence at the very end stays open
    assert ends(4, [4], 3, close_last=True) == [0, 0, 1, 0, 0, 1]  # natural and forced at once: one end
    assert ends(0, [], 3) == []


def _lengths(num_tokens: int, natural: list[int], shortest: int | None, longest: int | None, close: bool) -> list[int]:
    """Tokens of each sentence, ends included; a last open one has none."""
    with_ends, _ = insert_ends(
        list(range(100, 100 + num_tokens)),
        [(i, i + 1) for i in range(num_tokens)],
        decided(num_tokens, natural, close),
        sentence_end_token_id=END,
        max_sentence_tokens=longest,
        min_sentence_tokens=shortest,
        close_last=close,
        last_ink=num_tokens - 1,
    )
    places = np.flatnonzero(with_ends == END)
    return np.diff(np.concatenate([[-1], places])).tolist()


def test_short_sentences_are_joined_by_hand():
    natural = [3, 10, 14, 40, 45, 60, 100]
    assert _lengths(100, natural, 8, None, True) == [11, 31, 21, 41]  # 3 + 7; 4 + 26; 5 + 15; 40, and an end each
    assert _lengths(100, natural, 8, 16, True) == [11, 16, 16, 16, 16, 16, 16]
    assert _lengths(100, natural, 16, 16, True) == [
        16,
        16,
        16,
        16,
        16,
        16,
        11,
    ]  # blocks
    assert _lengths(98, [3, 10, 98], 20, None, True) == [99]
    assert _lengths(98, [3, 10, 98], 20, None, False) == []
    assert _lengths(1, [1], 20, 30, True) == [2]


def test_a_sentence_that_ends_in_the_last_token_of_an_open_text():
    """It stays open until a token follows, joined or not: no end comes last in a prompt."""
    for shortest in (None, 2):
        with_ends, _ = insert_ends(
            [5, 6, 7],
            [(0, 2), (2, 4), (4, 9)],
            [SentenceEnd(2, 2), SentenceEnd(6, 6)],
            sentence_end_token_id=END,
            max_sentence_tokens=None,
            min_sentence_tokens=shortest,
            close_last=False,
        )
        assert with_ends.tolist() == [5, END, 6, 7]


@pytest.mark.parametrize(("shortest", "longest"), [(12, 20), (24, 40), (32, 32), (5, None)])
def test_joining_looks_at_nothing_that_follows(shortest, longest):
    """A prompt's ends are those of the text that it begins, as far as it goes."""
    tokenizer = SentenceTokenizer.from_backend(
        tiny_tokenizer().backend_tokenizer, min_sentence_tokens=shortest, max_sentence_tokens=longest
    )
    text = prose(1500)
    whole = tokenizer.encode_document(text, complete=True)
    assert tokenizer.decode(whole) == text
    lengths = np.diff(np.flatnonzero(np.concatenate([[True], whole[1:] == END])))
    assert lengths[:-1].min() >= shortest
    assert longest is None or lengths.max() <= longest
    cut = text.rindex(" ", 0, 700)  # between words, where the tokens of a prefix are a prefix of the tokens
    prompt = tokenizer.encode_document(text[:cut], complete=False)
    assert prompt.tolist() == whole[: len(prompt)].tolist()


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"min_sentence_tokens=30 .* at most max_sentence_tokens=20"):
        SentenceTokenizer.from_backend(
            tiny_tokenizer().backend_tokenizer, min_sentence_tokens=30, max_sentence_tokens=20
        )


def test_plain_tokenizer_leaves_ends_out():
    plain = tiny_tokenizer(False)
    assert plain(PAGE)["input_ids"] == [START, *tiny_tokenizer().plain_ids(PAGE)]
    assert plain.decode(plain(PAGE)["input_ids"]) == PAGE


def test_special_tokens_show_when_asked():
    tokenizer = tiny_tokenizer()
    shown = tokenizer.decode(tokenizer("She ran. He")["input_ids"], skip_special_tokens=False)
    assert shown == f"{END_OF_TEXT}She ran.{END_OF_SENTENCE} He"


def test_loaded_equals_saved(tmp_path):
    """transformers rebuilds subclasses from vocabulary and merges, unless told to take the file whole."""
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), SentenceTokenizer.from_pretrained(tmp_path)):
        assert type(loaded) is SentenceTokenizer
        assert loaded(PAGE)["input_ids"] == tokenizer(PAGE)["input_ids"]
        assert loaded.max_sentence_tokens == 64
        assert loaded.decode(loaded(PAGE)["input_ids"]) == PAGE
    plain = AutoTokenizer.from_pretrained(tmp_path, insert_sentence_ends=False)
    assert END not in plain(PAGE)["input_ids"]


def test_batches_are_padded_on_the_left():
    tokenizer = tiny_tokenizer()
    batch = tokenizer(["She ran. He", "D"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][1].tolist()[0] == 0
    assert batch["input_ids"][1, batch["attention_mask"][1].bool()].tolist() == tokenizer("D")["input_ids"]
    assert tokenizer.batch_decode(batch["input_ids"]) == ["She ran. He", "D"]


def test_truncation_and_masks():
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(
        "She ran. He", truncation=True, max_length=4, return_special_tokens_mask=True, return_offsets_mapping=True
    )
    assert len(encoded["input_ids"]) == 4
    assert encoded["special_tokens_mask"] == [1, *[int(token == END) for token in encoded["input_ids"][1:]]]
    full = tokenizer("She ran. He", return_offsets_mapping=True)
    pieces = ["She ran. He"[s:e] for (s, e), t in zip(full["offset_mapping"], full["input_ids"]) if t > 2]
    assert "".join(pieces) == "She ran. He"


def test_lone_surrogates_are_refused():
    with pytest.raises(InputError, match=r"lone surrogate.*at character 2"):
        tiny_tokenizer()("a \ud800 b")


def test_pickled_equals_original():
    again = pickle.loads(pickle.dumps(tiny_tokenizer()))
    text = f"Literal {END_OF_SENTENCE} and {END_OF_TEXT}. Yes. No"
    assert again(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_what_it_does_not_take_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(UnsupportedError, match="pairs"):
        tokenizer("a", "b")
    with pytest.raises(TokenizerError, match="str"):
        tokenizer([1, 2])


def test_tokenizer_without_special_tokens_is_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(TokenizerError, match=r"endofsentence"):
        SentenceTokenizer.from_backend(Tokenizer(models.BPE({"a": 0}, [])))


@pytest.mark.parametrize("size", [100, 1 << 17])
def test_vocabulary_size_is_checked(size):
    with pytest.raises(ConfigError, match=str(size)):
        train_bpe(["text"], size)


def test_training_on_nothing_is_refused():
    with pytest.raises(CorpusError, match="no text"):
        train_bpe([], 300)


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece models with byte fallback decode: a space before each word, but none at a text's start."""
    words = ["▁cat", "▁dog", "s", "▁"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("seed", range(20))
def test_streams_of_bytes_and_words(seed):
    """What is shown adds up to the text; words keep the space before them. Of broken characters something is shown."""
    tokenizer, chooser = byte_fallback_tokenizer(), random.Random(seed)

    def ids(*pieces: str) -> list[int]:
        return [tokenizer.token_to_id(piece) for piece in pieces]

    words = [ids("▁cat"), ids("▁dog"), ids("s"), ids("<0x41>"), ids("<0xE2>", "<0x82>", "<0xAC>")]
    prompt, new = ([token for word in chooser.choices(words, k=count) for token in word] for count in (12, 30))
    for context in (prompt, []):
        stream = TextStream(tokenizer, (), context)
        shown = "".join(stream.add(token) for token in new) + stream.finish()
        assert tokenizer.decode(context) + shown == tokenizer.decode([*context, *new])
    broken = [chooser.choice([*ids("<0xE2>", "<0x82>", "<0xAC>"), *new]) for _ in range(40)]
    stream = TextStream(tokenizer, (), prompt)
    shown = "".join(stream.add(token) for token in broken) + stream.finish()
    assert len(shown) > 10
    assert stream.text == shown


def test_what_transformers_asks_of_a_tokenizer():
    """Its own parts hand arguments along that differ from release to release; none of them may be a stranger."""
    model, tokenizer = tiny_pair()
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in ("It was late.", "He went")]
    ids = tokenizer.apply_chat_template(chats[0])["input_ids"]
    assert ids == tokenizer.encode("[user] It was late. ", add_special_tokens=False)
    batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert tokenizer("a", text_target="b")["labels"] == tokenizer.encode("b")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    few = {"max_new_tokens": 3, "do_sample": False}
    (alone,) = write("It was late.", **few)
    assert alone["generated_text"].startswith("It was late.")
    together = write(["It was late.", "He went"], batch_size=2, **few)
    assert together[0] == [alone]
    assert write(chats[0], **few)[0]["generated_text"][-1]["role"] == "assistant"
    collated = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer("a b"), tokenizer("c")])
    assert collated["labels"].shape == collated["input_ids"].shape

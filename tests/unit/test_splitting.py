"""Where sentences end: never moved by text to come, in linear time, whatever the text; and the rule's number."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prose import PAGE, tiny_tokenizer
from thoughtformer.errors import CorpusError, InputError, TokenizerError
from thoughtformer.text import SentenceTokenizer, packing
from thoughtformer.text import splitting as rules
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.packing import TokenisedCorpus
from thoughtformer.text.splitting import SentencexSplitter, WholeParagraphSplitter, splitter_of

#: What text is made of where its sentences are hard to tell.
PARTS = [
    "It was late. ",
    "He went home",
    "She laughed. ",
    "said the old man. ",
    '"Come in. It is cold." ',
    '"Why?" ',
    "“Yes. ",
    "No.” ",
    "'Never. Not once.' ",
    "(See p. 3. It is odd.) ",
    "[1] ",
    "Mr. ",
    "Dr. Brown ",
    "the U.S. ",
    "e.g. ",
    "3.5 ",
    "J. R. ",
    "1. ",
    "...",
    "… ",
    "?! ",
    "! ",
    ". ",
    "? ",
    '"',
    "'",
    "“",
    "”",
    "‘",
    "’",
    "« Oui. » ",
    "(",
    ")",
    "\n",
    "\n\n",
    "\r\n",
    "\r\n\r\n",
    "\t",
    "  ",
    "\u00a0",
    "\u2028",
    "\u3000",
    "你好。",
    "好",
    "http://a.example/b.c. ",
    "and ",
    "a",
    "Z",
    "7",
    "--",
    ", ",
    "; ",
    "\ufeff",
    "\ufffd",
    "\U0001f469\u200d\U0001f467 ",
    "e\u0301. ",
    "\u202e",
]
TEXTS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=25).map("".join)


def assert_prefixes(tokenizer: SentenceTokenizer, text: str) -> None:
    """The ids of every prefix that ends between tokens are the first ids of the whole text, complete or not."""
    plain = tokenizer.plain_ids(text)
    wholes = [tokenizer.encode_document(text, complete=complete).tolist() for complete in (False, True)]
    for count in range(len(plain) + 1):
        prefix = tokenizer.backend_tokenizer.decode(plain[:count])
        if tokenizer.plain_ids(prefix) != plain[:count]:
            continue  # within a character
        ids = tokenizer.encode_document(prefix, complete=False).tolist()
        for whole in wholes:
            assert whole[: len(ids)] == ids, (prefix, text)


@pytest.mark.parametrize(
    "lengths",
    [
        {},
        {"max_sentence_tokens": 9},
        {"min_sentence_tokens": 8},
        {"min_sentence_tokens": 6, "max_sentence_tokens": 12},
    ],
)
def test_a_prompts_ids_begin_those_of_every_text_that_begins_with_it(lengths):
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = SentenceTokenizer.from_backend(backend, **({"max_sentence_tokens": 64} | lengths))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(text=TEXTS)
    def check(text: str) -> None:
        assert_prefixes(tokenizer, text)

    check()
    assert_prefixes(tokenizer, PAGE[:1200])


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back(text):
    for rule in (1, 2):
        tokenizer = SentenceTokenizer.from_backend(tiny_tokenizer().backend_tokenizer, sentence_rule=rule)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentences_by_hand():
    ends = SentencexSplitter().ends
    for sentences in (
        ["It was late.", " He went home."],
        ["Mr. Brown paid 3.5 dollars.", " He left."],
        ['"It is late. Come in."', " She laughed.", " He didn't."],
        ['"It is late. Come in," she said.', " He didn't."],
        ["She asked (it was cold. Very.) for tea.", " He brought it."],
        ["A heading", "\n\nIts text.", " More."],
        ["Wait!", " Why?", " No."],
    ):
        text, places = "".join(sentences), np.cumsum([len(sentence) for sentence in sentences]).tolist()
        assert ends(text) == places, text
    assert ends("") == ends("  \n ") == []


@pytest.mark.parametrize("splitter", [SentencexSplitter(), WholeParagraphSplitter()], ids=["rule 2", "rule 1"])
def test_no_text_panics(splitter):
    """A capital letter, white space of several bytes and a full stop have sentencex panic; and its like."""
    for space in "\u0085\u00a0\u1680\u2003\u2028\u202f\u205f\u3000":
        for text in (
            f"Plan B{space}. Then we left.",
            f"A{space}.",
            f"{space}B{space}.{space}C",
            f"“A{space}.”{space}B.",
        ):
            ends = splitter.ends(text)
            assert ends == sorted(set(ends))
            assert all(0 < end <= len(text) and not text[end - 1].isspace() for end in ends)
    with pytest.raises(InputError, match="surrogate"):
        tiny_tokenizer().encode("half \ud800 a character. More.")


def test_what_sentencex_raises_is_survived(monkeypatch):
    """pyo3's PanicException is no Exception; what stops a program is let through."""

    class PanicException(BaseException):
        pass

    def panics(*args):
        raise PanicException

    def stops(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rules.sentencex, "get_sentence_boundaries", panics)
    for splitter in (SentencexSplitter(), WholeParagraphSplitter()):
        assert splitter.ends("It was late. He went home.")[-1] == 26
    monkeypatch.setattr(rules.sentencex, "get_sentence_boundaries", stops)
    with pytest.raises(KeyboardInterrupt):
        SentencexSplitter().ends("It was late. He went home.")


@pytest.mark.parametrize("rule", [1, 2])
def test_time_grows_with_the_text_alone(rule):
    """Four times the text, at most eight times the work, counted in what sentencex is given to read."""
    read = []
    boundaries = rules.sentencex.get_sentence_boundaries
    splitter = splitter_of(rule, "en")

    def counting(language, text):
        read.append(len(text) ** 2)  # its worst case
        return boundaries(language, text)

    rules.sentencex.get_sentence_boundaries = counting
    try:
        for unit in ("“a. ", "“", '"', "(a. ", "'", "Mr. ", "a\u00a0. ", "a. ", "x"):
            work = []
            for length in (40_000, 160_000):
                read.clear()
                splitter.ends((unit * length)[:length])
                work.append(sum(read))
            assert work[1] <= 8 * work[0] + 1e6, unit
    finally:
        rules.sentencex.get_sentence_boundaries = boundaries


def test_the_rule_is_saved_and_old_folders_keep_theirs(tmp_path):
    new = tiny_tokenizer()
    assert new.sentence_rule == rules.NEWEST_RULE == 2
    new.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    values = json.loads(file.read_text())
    assert values["sentence_rule"] == 2
    assert SentenceTokenizer.from_pretrained(tmp_path).splitter.identity == new.splitter.identity
    file.write_text(json.dumps(values | {"sentence_rule": 3}))
    with pytest.raises(TokenizerError, match="sentence_rule=3"):
        SentenceTokenizer.from_pretrained(tmp_path)
    del values["sentence_rule"]
    file.write_text(json.dumps(values))
    old = SentenceTokenizer.from_pretrained(tmp_path)
    assert old.sentence_rule == 1
    assert old.splitter.identity != new.splitter.identity, "token files of the two are told apart"
    text = '"It is late. Come in." She laughed. He left.'
    assert old("x " + text)["input_ids"] == old.encode("x " + text)


def _killing(first, documents):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_fails_or_is_killed_says_so(tmp_path, monkeypatch):
    texts = ["It was late. He went home. " * 40] * 30
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    corpus = Corpus(sources=[tmp_path / "a.txt"])
    whole = TokenisedCorpus.build(corpus, tiny_tokenizer(), folder=tmp_path / "c", num_processes=2)
    alone = TokenisedCorpus.build(corpus, tiny_tokenizer(), folder=tmp_path / "d", num_processes=1)
    assert whole.digest == alone.digest
    assert len(whole) == 30
    for num_processes in (1, 2):
        broken = SentenceTokenizer.from_backend(tiny_tokenizer().backend_tokenizer)
        broken.splitter = _Panicking()
        with pytest.raises(CorpusError, match="document 1 of the corpus"):
            TokenisedCorpus.build(corpus, broken, folder=tmp_path / "e", num_processes=num_processes)
    monkeypatch.setattr(packing, "_tokenise", _killing)
    with pytest.raises(CorpusError, match="killed"):
        TokenisedCorpus.build(corpus, tiny_tokenizer(), folder=tmp_path / "f", num_processes=2)
    assert not [path for place in ("e", "f") for path in (tmp_path / place).rglob("*") if path.is_file()]


class _Panicking:
    identity = "panics"

    def decided(self, text, *, complete=False):
        raise _Panic("as native code does")


class _Panic(BaseException):
    pass


def test_long_texts_take_no_time_by_the_clock():
    """No more than a second for 200 kB of what took minutes; generous, because other work may be under way."""
    tokenizer = SentenceTokenizer.from_backend(tiny_tokenizer().backend_tokenizer)
    chooser = random.Random(0)
    for unit in ("“a. ", "\u00a0", '"a. '):
        started = time.process_time()
        tokenizer.encode((unit * 100_000)[: 200_000 + chooser.randrange(9)])
        assert time.process_time() - started < 10


def test_white_space_behind_an_end_that_may_be_taken_back_is_read_once():
    """Its time grew with the square: 100,000 spaces took 45 seconds."""
    for said in ('He said "so."', "Wait..."):
        text = said + " " * 100_000 + "but"
        started = time.process_time()
        (end,) = SentencexSplitter().decided(text)
        assert time.process_time() - started < 10
        assert (end.place, end.unless) == (len(said), len(text) - 3)
        assert SentencexSplitter().decided(text.replace("  but", "\n\nbut"))[0].unless == -1, "a blank line ends it"

"""Documents out of every format, and mistakes met with an error that names them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest

from prose import prose, tiny_tokenizer
from thoughtformer.errors import CorpusError
from thoughtformer.files import SEAL, seal, sealed_json
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.packing import MANIFEST, STARTS, PackedRows, TokenisedCorpus

DOCUMENTS = ["First document.\r\nTwo lines. ", "Second: ünï\n\n", "Third."]
AS_TEXT = "\n<|endoftext|>\n".join(DOCUMENTS)


def write(path, text: str) -> None:
    opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix)
    data = text.encode()
    if path.suffix == ".zst":
        import zstandard

        data = zstandard.compress(data)
    if opener is None:
        path.write_bytes(data)
    else:
        with opener(path, "wb") as stream:
            stream.write(data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
def test_text_files(tmp_path, suffix):
    path = tmp_path / f"data.txt{suffix}"
    write(path, AS_TEXT)
    assert list(Corpus(sources=[path])) == DOCUMENTS
    assert list(Corpus(sources=[path], separator=None)) == [AS_TEXT]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"data.jsonl{suffix}"
    write(path, "\n".join(json.dumps({"body": text, "n": 1}) for text in DOCUMENTS) + "\n\n")
    assert list(Corpus(sources=[path], column="body")) == DOCUMENTS


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS, "n": [1, 2, 3]}), path)
    assert list(Corpus(sources=[path])) == DOCUMENTS
    with pytest.raises(CorpusError, match=r"no column 'texd'.*Did you mean 'text'"):
        list(Corpus(sources=[path], column="texd"))


def test_saved_data_sets(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "data")
    assert list(Corpus(sources=[tmp_path / "data"])) == DOCUMENTS


def test_folders_in_name_order(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "z.txt", "last")
    write(tmp_path / "a.txt.gz", "first")
    write(tmp_path / "ignored.bin", "\0")
    assert list(Corpus(sources=[tmp_path])) == ["first", "last"]


def test_each_source_gives_its_share(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.txt", "\n<|endoftext|>\n".join(f"{name}{n:09}" for n in range(100)))
    documents = list(Corpus(sources=[tmp_path / "a.txt", tmp_path / "b.txt"], max_bytes=100))
    assert documents == [f"{name}{n:09}" for name in "ab" for n in range(5)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "every document is empty"),
        ("separators.txt", b"<|endoftext|>\n<|endoftext|>\n", "every document is empty"),
        ("zero.txt", b"abc\0def", "zero byte"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("broken.txt.gz", b"not gzip", "can't read"),
        ("broken.txt.xz", b"not xz", "can't read"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("long.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
        ("list.jsonl", b"[1]", "a list, not an object"),
        ("column.jsonl", b'{"txet": "a"}', "no column 'text'.*Did you mean 'txet'"),
        ("number.jsonl", b'{"text": 3}', "holds int, not text"),
        ("surrogate.jsonl", b'{"text": "a \\ud800 b"}', "line 1: a lone surrogate at character 2"),
        ("broken.txt.zst", b"not zstd", "can't read"),
        ("broken.parquet", b"PAR1 nothing", "Parquet"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=f"(?s){message}"):
        list(Corpus(sources=[tmp_path / name]))


def test_truncated_and_joined_zstd_files(tmp_path):
    import zstandard

    whole = zstandard.compress(prose(200_000).encode())
    (tmp_path / "a.txt.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match="truncated"):
        list(Corpus(sources=[tmp_path / "a.txt.zst"]))
    (tmp_path / "a.txt.zst").write_bytes(whole + zstandard.compress(b" more"))
    assert list(Corpus(sources=[tmp_path / "a.txt.zst"])) == [prose(200_000) + " more"]


def test_missing_and_misnamed_sources(tmp_path):
    with pytest.raises(CorpusError, match=r"no file or folder .*nowhere"):
        Corpus(sources=[tmp_path / "nowhere.txt"])
    with pytest.raises(CorpusError, match="holds no"):
        Corpus(sources=[tmp_path])
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(CorpusError, match="named neither"):
        Corpus(sources=[tmp_path / "data.csv"])
    with pytest.raises(CorpusError, match="at least one"):
        Corpus(sources=[])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_tokenised_corpus(tmp_path, num_processes):
    path = tmp_path / "data.txt"
    documents = [prose(3000, seed=seed) for seed in range(4)]
    # Written out, special tokens are text, in every process.
    documents.append("a <|endoftext|> b <|endofsentence|> c <|padding|>. " + prose(900))
    write(path, "\n<|endoftext|>\n".join(documents))
    tokenizer, seen = tiny_tokenizer(), []
    corpus = TokenisedCorpus.build(
        Corpus(sources=[path]),
        tokenizer,
        folder=tmp_path / "cache",
        num_processes=num_processes,
        on_progress=lambda count, size: seen.append((count, size)),
    )
    assert len(corpus) == 5
    assert corpus.num_bytes.tolist() == [len(document.encode()) for document in documents]
    for number, document in enumerate(documents):
        assert corpus.document(number).tolist() == tokenizer.encode_document(document, complete=True).tolist()
    assert seen == [(n + 1, size) for n, size in enumerate(corpus.num_bytes.tolist())]
    rows = PackedRows(corpus, 100)
    assert len(rows) == len(corpus.tokens) // 100
    assert rows[3]["input_ids"].tolist() == corpus.tokens[300:400].tolist()
    assert rows[3]["labels"].tolist() == [-100, *corpus.tokens[301:400].tolist()]
    with pytest.raises(CorpusError, match="less than one row"):
        PackedRows(corpus, 10**6)


def test_tokenised_once_until_something_changes(tmp_path):
    path = tmp_path / "data.txt"
    write(path, prose(2000))

    def build(ends: bool = True) -> TokenisedCorpus:
        return TokenisedCorpus.build(
            Corpus(sources=[path]), tiny_tokenizer(ends), folder=tmp_path / "cache", num_processes=1
        )

    first = build()
    assert build().folder == first.folder
    assert build(ends=False).folder != first.folder
    write(path, prose(2000, seed=1))
    assert build().folder != first.folder
    assert not np.array_equal(build().tokens, first.tokens)


def test_token_files_of_another_text_are_not_believed(tmp_path, caplog):
    """Folders that are whole, under each other's names, and one that was sealed around something else."""
    corpora = []
    for name in ("a", "b"):
        write(tmp_path / f"{name}.txt", prose(2000, seed=len(corpora)))
        corpora.append(Corpus(sources=[tmp_path / f"{name}.txt"]))

    def build(corpus: Corpus) -> TokenisedCorpus:
        return TokenisedCorpus.build(corpus, tiny_tokenizer(), folder=tmp_path / "cache", num_processes=1)

    first, second = map(build, corpora)
    digests = first.digest, second.digest
    first.folder.rename(tmp_path / "draft")
    second.folder.rename(first.folder)
    (tmp_path / "draft").rename(second.folder)
    assert tuple(build(corpus).digest for corpus in corpora) == digests
    assert caplog.text.count("another text") == 2

    for content in ('{"digest": "x"}', '{"digest": "x", "identity": "y", "dtype": "no type"}', "{}"):
        (first.folder / MANIFEST).write_text(content)
        seal(first.folder)
        assert build(corpora[0]).digest == digests[0]
    (first.folder / STARTS).unlink()
    seal(first.folder)
    assert build(corpora[0]).digest == digests[0]
    (first.folder / SEAL).write_text(sealed_json({"version": 1, "files": ["tokens.bin"]}))
    assert build(corpora[0]).digest == digests[0]


def test_failed_tokenising_leaves_nothing(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, '{"text": "good"}\n{"bad": 1}\n')
    with pytest.raises(CorpusError, match="line 2"):
        TokenisedCorpus.build(Corpus(sources=[path]), tiny_tokenizer(), folder=tmp_path / "cache", num_processes=1)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []

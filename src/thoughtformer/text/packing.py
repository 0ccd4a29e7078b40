"""Corpora as token files: tokenised once, in parallel, kept on disk, read by memory map, packed into rows."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from thoughtformer.errors import CorpusError, OutputError
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["PackedRows", "TokenisedCorpus", "cache_folder"]

#: Raise when what is stored, or how it is made, changes.
FORMAT_VERSION = 4
SMALL_CORPUS_BYTES = 1_000_000


def cache_folder() -> Path:
    """Where tokenised corpora are kept: $THOUGHTFORMER_CACHE, or thoughtformer in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "thoughtformer"
    return Path(os.environ.get("THOUGHTFORMER_CACHE", default))


class TokenisedCorpus:
    """The ids of all documents end to end, each starting with `<|endoftext|>` and, with sentence ends, all closed.

    Attributes:
        tokens: memory-mapped ids of all documents.
        starts: where each document starts in `tokens`, and the total length.
        num_bytes: UTF-8 bytes of each document.
        digest: SHA-256 of all ids; the same wherever the text came from.
    """

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        self.folder = folder
        self.digest: str = manifest["digest"]
        self.tokens = np.memmap(folder / "tokens.bin", dtype=manifest["dtype"], mode="r")
        self.starts = np.load(folder / "starts.npy", allow_pickle=False)
        self.num_bytes = np.load(folder / "num_bytes.npy", allow_pickle=False)

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        tokenizer: SentenceTokenizer,
        *,
        folder: Path | None = None,
        num_processes: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> TokenisedCorpus:
        """Tokenises a corpus, or finds it done.

        Args:
            corpus: the documents.
            tokenizer: writes sentence ends or not, as it is set.
            folder: where to keep token files; default `cache_folder()`.
            num_processes: default: one a core, or one for little text.
            on_progress: called after each document with their number so far and its bytes.

        Raises:
            CorpusError: as reading the corpus does; nothing half-written is kept.
            OutputError: the folder can't be written to.
        """
        backend = tokenizer.backend_tokenizer.to_str()
        settings = [
            tokenizer.insert_sentence_ends,
            tokenizer.max_sentence_tokens,
            tokenizer.min_sentence_tokens,
            tokenizer.splitter.identity,
        ]
        identity = json.dumps([FORMAT_VERSION, corpus.fingerprint(), settings, backend], sort_keys=True)
        place = (folder or cache_folder()) / "tokens" / hashlib.sha256(identity.encode()).hexdigest()[:24]
        if (place / "manifest.json").exists():
            return cls(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".writing-", dir=place.parent))
        except OSError as error:
            raise _cant_write(place.parent, error) from None
        try:
            try:
                _write(draft, corpus, tokenizer, num_processes or _useful_processes(corpus), on_progress)
            except OSError as error:
                raise _cant_write(place.parent, error) from None
            try:
                draft.rename(place)
            except OSError:
                if not (place / "manifest.json").exists():  # another process may have finished first
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return cls(place)

    def __len__(self) -> int:
        return len(self.num_bytes)

    def document(self, number: int) -> np.ndarray:
        """The ids of one document."""
        return np.asarray(self.tokens[self.starts[number] : self.starts[number + 1]], dtype=np.int64)


class PackedRows(Dataset):
    """Rows of equal length cut from a tokenised corpus, documents one after the other; a last short row is left out.

    Documents don't see each other: the model reads their starts off the ids.
    """

    def __init__(self, corpus: TokenisedCorpus, row_tokens: int) -> None:
        self.corpus = corpus
        self.row_tokens = row_tokens
        if len(self) == 0:
            raise CorpusError(f"the corpus has {len(corpus.tokens)} tokens, less than one row of {row_tokens}.")

    def __len__(self) -> int:
        return len(self.corpus.tokens) // self.row_tokens

    def __getitem__(self, index: int) -> dict[str, Int[Tensor, " seq"]]:
        start = index * self.row_tokens
        ids = torch.from_numpy(self.corpus.tokens[start : start + self.row_tokens].astype(np.int64))
        labels = ids.clone()
        labels[0] = -100  # nothing predicts a row's first token; so a count of labels is a count of losses
        return {"input_ids": ids, "labels": labels}


def _cant_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"can't keep token files in {folder}: {error}. Name another folder by THOUGHTFORMER_CACHE.")


def _useful_processes(corpus: Corpus) -> int:
    """One a core that this process may use; one for little text, which is done before others would have started."""
    if corpus.size_on_disk() < SMALL_CORPUS_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker_tokenizer: SentenceTokenizer | None = None


def _start_worker(tokenizer: SentenceTokenizer) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    _worker_tokenizer = tokenizer


def _tokenise(document: str) -> tuple[np.ndarray, int]:
    assert _worker_tokenizer is not None
    return _worker_tokenizer.encode_document(document, complete=True), len(document.encode())


def _tokenised(corpus: Corpus, tokenizer: SentenceTokenizer, num_processes: int) -> Iterator[tuple[np.ndarray, int]]:
    if num_processes == 1:
        for document in corpus:
            yield tokenizer.encode_document(document, complete=True), len(document.encode())
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_processes, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        yield from pool.imap(_tokenise, corpus, chunksize=4)


def _write(
    folder: Path,
    corpus: Corpus,
    tokenizer: SentenceTokenizer,
    num_processes: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    starts, num_bytes = [0], []
    digest = hashlib.sha256()
    with (folder / "tokens.bin").open("wb") as stream:
        for ids, size in _tokenised(corpus, tokenizer, num_processes):
            written = ids.astype(dtype).tobytes()
            stream.write(written)
            digest.update(written)
            starts.append(starts[-1] + len(ids))
            num_bytes.append(size)
            if on_progress is not None:
                on_progress(len(num_bytes), size)
    np.save(folder / "starts.npy", np.asarray(starts, dtype=np.int64))
    np.save(folder / "num_bytes.npy", np.asarray(num_bytes, dtype=np.int64))
    manifest = {"version": FORMAT_VERSION, "dtype": dtype, "digest": digest.hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))

"""Corpora as token files: tokenised once, in parallel, kept on disk, read by memory map, packed into rows."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from thoughtformer.errors import CorpusError, OutputError
from thoughtformer.files import SEAL, check_seal, new_folder, read_json, seal
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["PackedRows", "TokenisedCorpus", "cache_folder"]

logger = logging.getLogger(__name__)

#: Raise when what is stored, or how it is made, changes.
FORMAT_VERSION = 6
MANIFEST, TOKENS, STARTS, NUM_BYTES = "manifest.json", "tokens.bin", "starts.npy", "num_bytes.npy"
SMALL_CORPUS_BYTES = 1_000_000
DOCUMENTS_AT_ONCE = 4


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
        identity: of what they were made of: the text, the tokenizer, and how they are written.
    """

    def __init__(self, folder: Path) -> None:
        """Opens token files, which are read once for it, at some hundred megabytes a second and core.

        Raises:
            CorpusError: a file that is missing, or isn't what was written.
        """
        check_seal(folder, "the token files", kind=CorpusError)
        manifest = read_json(folder / MANIFEST, "the manifest of token files", kind=CorpusError)
        self.folder = folder
        try:
            self.digest, self.identity = str(manifest["digest"]), str(manifest["identity"])
            # numpy maps no empty file.
            is_empty = not (folder / TOKENS).stat().st_size
            dtype = np.dtype(manifest["dtype"])
            self.tokens = np.zeros(0, dtype) if is_empty else np.memmap(folder / TOKENS, dtype=dtype, mode="r")
            self.starts = np.load(folder / STARTS, allow_pickle=False)
            self.num_bytes = np.load(folder / NUM_BYTES, allow_pickle=False)
        except (OSError, EOFError, LookupError, TypeError, ValueError) as error:
            raise CorpusError(f"{folder} holds no token files of this version: {error}.") from None
        if len(self.starts) != len(self.num_bytes) + 1 or self.starts[-1] != len(self.tokens):
            raise CorpusError(f"the token files in {folder} don't belong together.")

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
            CorpusError: as reading the corpus does; nothing half-written is kept. Token files that are damaged are made
                anew, and the log says so.
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
        name = hashlib.sha256(identity.encode()).hexdigest()[:24]
        place = (folder or cache_folder()) / "tokens" / name
        if place.exists() or place.is_symlink():
            try:
                return cls(place)._of(name)
            except CorpusError as error:
                logger.warning("token files are made anew: %s", error)
                _remove(place)
        try:
            with new_folder(place) as draft:
                _write(draft, name, corpus, tokenizer, num_processes or _useful_processes(corpus), on_progress)
        except OutputError as error:
            if not (place / SEAL).exists():  # another process may have finished first
                raise _cant_write(place.parent, error) from None
        return cls(place)._of(name)

    def _of(self, identity: str) -> TokenisedCorpus:
        if self.identity != identity:
            raise CorpusError(f"the token files in {self.folder} are those of another text or tokenizer.")
        return self

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


def _remove(place: Path) -> None:
    try:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink()
    except OSError as error:
        raise _cant_write(place.parent, error) from None


def _cant_write(folder: Path, error: Exception) -> OutputError:
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


def _tokenise(first: int, documents: list[str]) -> list[tuple[np.ndarray, int]]:
    assert _worker_tokenizer is not None
    return [_encoded(_worker_tokenizer, first + number, document) for number, document in enumerate(documents)]


def _encoded(tokenizer: SentenceTokenizer, number: int, document: str) -> tuple[np.ndarray, int]:
    try:
        return tokenizer.encode_document(document, complete=True), len(document.encode())
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # what native code raises needn't be an Exception, nor cross processes
        raise CorpusError(
            f"document {number + 1:,} of the corpus, which begins {document[:60]!r}, can't be tokenised: {error}"
        ) from None


def _tokenised(corpus: Corpus, tokenizer: SentenceTokenizer, num_processes: int) -> Iterator[tuple[np.ndarray, int]]:
    if num_processes == 1:
        for number, document in enumerate(corpus):
            yield _encoded(tokenizer, number, document)
        return
    context = multiprocessing.get_context("spawn")
    # Not multiprocessing's pool: that waits for ever for what a worker had that is killed.
    pool = ProcessPoolExecutor(num_processes, context, initializer=_start_worker, initargs=(tokenizer,))
    waiting: deque[Future[list[tuple[np.ndarray, int]]]] = deque()
    first = 0
    try:
        documents = iter(corpus)
        while part := list(islice(documents, DOCUMENTS_AT_ONCE)):
            waiting.append(pool.submit(_tokenise, first, part))
            first += len(part)
            if len(waiting) > 2 * num_processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise CorpusError(
            f"a process that tokenised was killed, one of {num_processes}: perhaps memory is short. Documents up to "
            f"{first:,} were under way; try again, or with fewer processes at once."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _write(
    folder: Path,
    identity: str,
    corpus: Corpus,
    tokenizer: SentenceTokenizer,
    num_processes: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    starts, num_bytes = [0], []
    digest = hashlib.sha256()
    with (folder / TOKENS).open("wb") as stream:
        for ids, size in _tokenised(corpus, tokenizer, num_processes):
            written = ids.astype(dtype).tobytes()
            stream.write(written)
            digest.update(written)
            starts.append(starts[-1] + len(ids))
            num_bytes.append(size)
            if on_progress is not None:
                on_progress(len(num_bytes), size)
    np.save(folder / STARTS, np.asarray(starts, dtype=np.int64))
    np.save(folder / NUM_BYTES, np.asarray(num_bytes, dtype=np.int64))
    manifest = {"version": FORMAT_VERSION, "identity": identity, "dtype": dtype, "digest": digest.hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    seal(folder)

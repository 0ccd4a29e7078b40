"""Documents from files: .txt, .jsonl, .parquet, plain or compressed, folders of these, and `datasets` data sets."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from thoughtformer.errors import CorpusError, nearest
from thoughtformer.text.tokenizer import END_OF_TEXT

__all__ = ["Corpus"]

FORMATS = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Some sources of documents, read one document at a time.

    Args:
        sources: files, folders (read recursively, in name order), folders that `datasets` saved, or
            `datasets:NAME[,CONFIG[,SPLIT]]` (SPLIT is `train` by default).
        column: where a .jsonl, .parquet or `datasets` record holds its text.
        separator: a line that separates documents in .txt and .md files; None makes each file one document. It is
            not part of any document, nor is the line break before it.
        max_bytes: stop each source at the document that reaches its equal share of these; None reads everything.
        encoding: of text files and .jsonl.

    Raises:
        CorpusError: a source is missing, empty, unreadable, binary, or lacks the column.
    """

    sources: Sequence[str | Path]
    column: str = "text"
    separator: str | None = END_OF_TEXT
    max_bytes: int | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise CorpusError(
                f"encoding={self.encoding!r} is none that Python knows, as utf-8 or latin-1 are."
            ) from None
        if "" in map(str, self.sources):
            raise CorpusError("a source of text has no name: give a file or a folder (here: .).")
        if not self.sources:
            raise CorpusError("no data: give at least one file, folder or datasets:NAME.")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise CorpusError(f"max_bytes={self.max_bytes} must be positive.")
        for source in self.sources:
            self.files(source)

    def files(self, source: str | Path) -> list[Path]:
        """The files behind a source; none for a `datasets` one."""
        if str(source).startswith(DATASETS_PREFIX):
            return []
        path = Path(source)
        if not path.exists():
            raise CorpusError(f"no file or folder {str(source)!r}. For a data set of a hub, write datasets:NAME.")
        if path.is_file():
            _format(path)
            return [path]
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return []
        found = sorted(file for file in path.rglob("*") if file.is_file() and _is_readable_name(file))
        if not found:
            raise CorpusError(f"folder {str(source)!r} holds no {', '.join(FORMATS)} file, plain or compressed.")
        return found

    def size_on_disk(self) -> float:
        """Bytes of all files; infinite for a data set of a hub."""
        files = [self.files(source) or _all_files(source) for source in self.sources]
        return sum(file.stat().st_size for part in files for file in part) if all(files) else float("inf")

    def fingerprint(self) -> dict[str, Any]:
        """What the documents depend on: settings, and each file's name, size and time of change."""
        files = [
            [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
            for source in self.sources
            for file in (self.files(source) or _all_files(source))
        ]
        return {
            "sources": [str(source) for source in self.sources],
            "files": files,
            "column": self.column,
            "separator": self.separator,
            "max_bytes": self.max_bytes,
            "encoding": self.encoding,
        }

    def __iter__(self) -> Iterator[str]:
        share = None if self.max_bytes is None else -(-self.max_bytes // len(self.sources))
        num_documents = 0
        for source in self.sources:
            num_bytes = 0
            for document in self._read_source(source):
                yield document
                num_documents += 1
                num_bytes += len(document.encode())
                if share is not None and num_bytes >= share:
                    break
        if not num_documents:
            raise CorpusError(f"no text in {', '.join(map(repr, map(str, self.sources)))}: every document is empty.")

    def _read_source(self, source: str | Path) -> Iterator[str]:
        files = self.files(source)
        documents = self._read_datasets(str(source)) if not files else (d for file in files for d in self._read(file))
        yield from (document for document in documents if document)

    def _read(self, path: Path) -> Iterator[str]:
        kind = _format(path)
        try:
            if kind == ".parquet":
                yield from self._read_parquet(path)
            else:
                with _open(path, self.encoding) as stream:
                    yield from (self._read_json_lines if kind == ".jsonl" else self._read_text)(stream, path)
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path} is not {self.encoding.upper()} text (byte {error.start}): binary, or of another encoding, "
                "which --encoding names."
            ) from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise CorpusError(f"can't read {path}: {error}") from None
        except ImportError as error:
            raise CorpusError(f"{path} needs {error.name}: pip install 'thoughtformer[train]'.") from None

    def _read_text(self, stream: IO[str], path: Path) -> Iterator[str]:
        lines: list[str] = []
        for line in stream:
            if "\0" in line:
                raise CorpusError(f"{path} holds a zero byte: it is binary, not text.")
            if self.separator is not None and line.rstrip("\r\n") == self.separator:
                yield _without_last_break("".join(lines))
                lines = []
            else:
                lines.append(line)
        yield "".join(lines)

    def _read_json_lines(self, stream: IO[str], path: Path) -> Iterator[str]:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{path}, line {number}: not JSON ({error}).") from None
            if not isinstance(record, dict):
                raise CorpusError(f"{path}, line {number}: a {type(record).__name__}, not an object with columns.")
            yield self._text(record, f"{path}, line {number}")

    def _read_parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            with _open_binary(path) as stream:
                table = pyarrow.parquet.ParquetFile(stream)
                names = table.schema_arrow.names
                if self.column not in names:
                    raise CorpusError(f"{path} has no column {self.column!r}.{nearest(self.column, names)}")
                for batch in table.iter_batches(columns=[self.column], batch_size=256):
                    for record in batch.to_pylist():
                        yield self._text(record, str(path))
        except pyarrow.ArrowInvalid as error:
            raise CorpusError(f"can't read {path} as Parquet: {error}") from None

    def _read_datasets(self, source: str) -> Iterator[str]:
        try:
            import datasets
        except ImportError:
            raise CorpusError(f"{source} needs datasets: pip install 'thoughtformer[train]'.") from None

        if source.startswith(DATASETS_PREFIX):
            name, *rest = source.removeprefix(DATASETS_PREFIX).split(",")
            config, split = [*rest, None, None][:2]
            try:
                data = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            except Exception as error:  # the library raises many kinds; each means that the data can't be had
                raise CorpusError(f"datasets can't load {name!r}: {error}") from None
        else:
            try:
                data = datasets.load_from_disk(source)
            except Exception as error:
                raise CorpusError(f"datasets can't load the folder {source}: {error}") from None
            if isinstance(data, datasets.DatasetDict):
                if "train" not in data:
                    raise CorpusError(f"{source} has no split 'train'.{nearest('train', map(str, data))}")
                data = data["train"]
        for record in data:
            yield self._text(dict(record), source)

    def _text(self, record: dict[str, Any], place: str) -> str:
        if self.column not in record:
            raise CorpusError(f"{place}: no column {self.column!r}.{nearest(self.column, map(str, record))}")
        text = record[self.column]
        if not isinstance(text, str):
            raise CorpusError(f"{place}: column {self.column!r} holds {type(text).__name__}, not text.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{place}: a lone surrogate at character {error.start}, which is no text.") from None
        return text


def _without_last_break(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _all_files(source: str | Path) -> list[Path]:
    path = Path(source)
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []


def _suffixes(path: Path) -> tuple[str, str]:
    """Format and compression by name: ('.txt', '.xz')."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def _is_readable_name(path: Path) -> bool:
    return _suffixes(path)[0] in FORMATS


def _format(path: Path) -> str:
    kind = _suffixes(path)[0]
    if kind not in FORMATS:
        raise CorpusError(
            f"{path} is named neither {', '.join(FORMATS)} nor one of these with {', '.join(COMPRESSIONS)}."
        )
    return kind


def _open_binary(path: Path) -> IO[bytes]:
    compression = _suffixes(path)[1]
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".bz2":
        return bz2.open(path, "rb")
    if compression == ".zst":
        try:
            import zstandard
        except ImportError:
            raise CorpusError(f"{path} needs zstandard: pip install 'thoughtformer[train]'.") from None
        return io.BytesIO(_decompress_zstd(path, zstandard.ZstdDecompressor()))
    return path.open("rb")


def _decompress_zstd(path: Path, decompressor: Any) -> bytes:
    """The whole content; zstandard's own reader takes a truncated file for a short one."""
    data, parts = path.read_bytes(), []
    while data:
        frame = decompressor.decompressobj()
        try:
            parts.append(frame.decompress(data))
        except Exception as error:  # ZstdError, of a module that may not be there
            raise CorpusError(f"can't read {path}: {error}") from None
        if not frame.eof:
            raise CorpusError(f"can't read {path}: the file is truncated.")
        data = frame.unused_data
    return b"".join(parts)


def _open(path: Path, encoding: str) -> IO[str]:
    # newline="": line breaks are text, and stay as they are.
    return io.TextIOWrapper(_open_binary(path), encoding=encoding, newline="")

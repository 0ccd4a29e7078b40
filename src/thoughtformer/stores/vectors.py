"""The sentence store: what the encoder made of a sentence, kept on disk for every later prompt and process.

One SQLite file, in write-ahead mode: many processes read while one writes, and a process that is killed in a write
leaves the last whole one. Vectors are kept by the fingerprint of what made them and a digest of the sentence's token
ids, in the model's own dtype, with a checksum each.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from thoughtformer.errors import ConfigError, InputError, OutputError, StoreError

__all__ = ["FILE", "MIB", "ModelStats", "StoreStats", "VectorStore"]

#: Raise when what is stored changes.
FORMAT_VERSION = 2
FILE = "sentences.sqlite"
MIB = 1 << 20
#: Sentences of one query; SQLite takes 32,766 parameters at most.
QUERY_SENTENCES = 1000
#: A sentence's last use is noted this coarsely, and so many at once, so that finding seldom writes.
USE_SECONDS, NOTED_USES = 600, 4096
BUSY_SECONDS = 60.0
#: Eviction goes on until this part of the limit, so that it comes seldom.
EVICT_TO = 0.9

SCHEMA = """
CREATE TABLE IF NOT EXISTS models (
    number INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT UNIQUE NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS sentences (
    model INTEGER NOT NULL, digest BLOB NOT NULL, used INTEGER NOT NULL, checksum INTEGER NOT NULL, vector BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS by_digest ON sentences (model, digest);
CREATE INDEX IF NOT EXISTS by_use ON sentences (used);
"""


@dataclass(frozen=True, kw_only=True)
class ModelStats:
    """What a store holds of one model."""

    fingerprint: str
    dtype: str
    sentences: int
    vector_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What a store holds; `used_bytes` of the file's `file_bytes` are in use, the rest is given to what comes next."""

    sentences: int
    used_bytes: int
    file_bytes: int
    max_bytes: int | None
    models: list[ModelStats]


class VectorStore:
    """A folder of sentence vectors, of any number of models.

    Use it as a context manager, or call `close`. May be shared by threads; other processes may have it open too.

    Args:
        folder: made if it isn't there.
        max_bytes: the least recently used sentences go when the store would use more; None: no limit.
        busy_seconds: how long to wait for another process that writes.

    Raises:
        ConfigError: a limit below 1 MiB.
        OutputError: the folder can't be written to.
        StoreError: what is there is no sentence store, or one of another format.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int | None = None, busy_seconds: float = BUSY_SECONDS) -> None:
        if max_bytes is not None and max_bytes < MIB:
            raise ConfigError(f"max_bytes={max_bytes} is less than an empty store needs: give {MIB} (1 MiB) or more.")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.busy_seconds = busy_seconds
        self._lock = threading.RLock()
        self._uses: dict[tuple[int, bytes], int] = {}
        self._process = os.getpid()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"can't make a sentence store in {self.folder}: {error.strerror or error}.") from None
        self._connection: sqlite3.Connection | None = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def file(self) -> Path:
        """Where everything is; beside it SQLite keeps what isn't merged yet."""
        return self.folder / FILE

    def stats(self) -> StoreStats:
        """What is held."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT fingerprint, dtype, count(vector), coalesce(sum(length(vector)), 0) "
                "FROM models LEFT JOIN sentences ON model = number GROUP BY number ORDER BY number"
            ).fetchall()
            models = [
                ModelStats(fingerprint=fingerprint, dtype=dtype, sentences=count, vector_bytes=size)
                for fingerprint, dtype, count, size in rows
            ]
            return StoreStats(
                sentences=sum(model.sentences for model in models),
                used_bytes=_used_bytes(connection),
                file_bytes=self.file.stat().st_size,
                max_bytes=self.max_bytes,
                models=models,
            )

    def verify(self) -> int:
        """Checks the file and every vector's checksum; returns how many vectors are damaged.

        Raises:
            StoreError: the file itself is damaged.
        """
        with self._reading() as connection:
            told = [line for (line,) in connection.execute("PRAGMA integrity_check(3)")]
            if told != ["ok"]:
                raise StoreError(f"{self.file} is damaged ({'; '.join(told)}): remove it, and index the text again.")
            rows = connection.execute(
                "SELECT fingerprint, digest, vector, checksum FROM sentences LEFT JOIN models ON model = number"
            )
            return sum(not _is_whole(*row) for row in rows)

    def prune(self, *, max_bytes: int | None = None, keep: Sequence[str] | None = None) -> int:
        """Removes sentences and gives their room back to the file system; returns how many were removed.

        Args:
            max_bytes: remove the least recently used until the store uses no more.
            keep: remove those of models of other fingerprints.
        """
        with self._writing() as connection:
            before = _count(connection)
            self._note_uses(connection)
            if keep is not None:
                others = [
                    number
                    for number, fingerprint in connection.execute("SELECT number, fingerprint FROM models")
                    if fingerprint not in keep
                ]
                for number in others:
                    connection.execute("DELETE FROM sentences WHERE model = ?", (number,))
                    connection.execute("DELETE FROM models WHERE number = ?", (number,))
            if max_bytes is not None:
                _evict(connection, max_bytes)
            removed = before - _count(connection)
        with self._lock, self._told():
            self._opened().execute("VACUUM")
            self._opened().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def close(self) -> None:
        """Notes what was used, and closes the file."""
        with self._lock:
            if self._connection is None:
                return
            if self._uses and self._process == os.getpid():
                with self._writing() as connection:
                    self._note_uses(connection)
            if self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        with self._told():
            # Autocommit: transactions are begun by hand, and shared by threads under a lock.
            connection = sqlite3.connect(
                self.file, timeout=self.busy_seconds, isolation_level=None, check_same_thread=False
            )
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                # A power cut may take the last transactions, but leaves a whole file.
                connection.execute("PRAGMA synchronous=NORMAL")
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
                if version not in (0, FORMAT_VERSION) or (version == 0 and tables):
                    raise StoreError(
                        f"{self.file} is no sentence store of format {FORMAT_VERSION}: name another folder, or "
                        "remove it."
                    )
                if version == 0:
                    connection.execute("BEGIN IMMEDIATE")
                    for statement in SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")
                    connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            return connection

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors as ours, with its own reason."""
        try:
            yield
        except StoreError:
            raise
        except (sqlite3.OperationalError, OSError) as error:
            raise OutputError(f"can't use the sentence store {self.file}: {error}.") from None
        # Where pages are damaged, values may be of any type.
        except (sqlite3.Error, TypeError, ValueError, UnicodeDecodeError) as error:
            raise StoreError(
                f"{self.file} is damaged, or no sentence store ({error}): remove it, and index the text again."
            ) from None

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise InputError(f"the sentence store {self.folder} is closed.")
        if self._process != os.getpid():
            # SQLite's connections must not cross a fork; the parent's is left to it.
            self._process, self._uses, self._lock = os.getpid(), {}, threading.RLock()
            self._connection = self._open()
        return self._connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        connection = self._opened()
        with self._lock, self._told():
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, or none of it."""
        connection = self._opened()
        with self._lock, self._told():
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite may have rolled back by itself, as where the disk is full
                    with suppress(sqlite3.Error):  # whose reason must not hide the first one's
                        connection.execute("ROLLBACK")
                raise

    def _note_uses(self, connection: sqlite3.Connection) -> None:
        connection.executemany(
            "UPDATE sentences SET used = ? WHERE model = ? AND digest = ?",
            [(used, model, digest) for (model, digest), used in self._uses.items()],
        )
        self._uses = {}

    def _find(self, fingerprint: str, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """The vectors that are there, by digest; a damaged one is as if it weren't."""
        found: dict[bytes, bytes] = {}
        now = _now()
        with self._reading() as connection:
            for first in range(0, len(digests), QUERY_SENTENCES):
                part = digests[first : first + QUERY_SENTENCES]
                marks = ",".join("?" * len(part))
                # The model is looked up each time: another process may have removed it.
                rows = connection.execute(
                    "SELECT model, digest, vector, checksum, used FROM sentences WHERE "
                    f"model = (SELECT number FROM models WHERE fingerprint = ?) AND digest IN ({marks})",
                    (fingerprint, *part),
                )
                for model, digest, vector, checksum, used in rows:
                    if not _is_whole(fingerprint, digest, vector, checksum):
                        continue
                    found[digest] = vector
                    if used != now and len(self._uses) < NOTED_USES:
                        self._uses[model, digest] = now  # written with the next sentences, or at the end
        return found

    def _add(self, fingerprint: str, dtype: str, shape: tuple[int, ...], vectors: Mapping[bytes, bytes]) -> None:
        """Keeps vectors by digest, all or none.

        Args:
            fingerprint: of what made them.
            dtype, shape: of each, for whoever looks.
            vectors: by the digest of a sentence's ids.
        """
        now = _now()
        with self._writing() as connection:
            self._note_uses(connection)
            connection.execute(
                "INSERT OR IGNORE INTO models (fingerprint, dtype, shape) VALUES (?, ?, ?)",
                (fingerprint, dtype, str(shape)),
            )
            (model,) = connection.execute("SELECT number FROM models WHERE fingerprint = ?", (fingerprint,)).fetchone()
            connection.executemany(
                "INSERT OR REPLACE INTO sentences (model, digest, used, checksum, vector) VALUES (?, ?, ?, ?, ?)",
                [
                    (model, digest, now, _checksum(fingerprint, digest, vector), vector)
                    for digest, vector in vectors.items()
                ],
            )
            if self.max_bytes is not None and _used_bytes(connection) > self.max_bytes:
                _evict(connection, int(self.max_bytes * EVICT_TO))


def _checksum(fingerprint: str, digest: bytes, vector: bytes) -> int:
    """Of a vector together with whose it is, and which model's."""
    return zlib.crc32(vector, zlib.crc32(digest, zlib.crc32(fingerprint.encode())))


def _is_whole(fingerprint: object, digest: object, vector: object, checksum: object) -> bool:
    """Whether a row is as it was written; in a damaged file its values may be of any type."""
    if not (isinstance(fingerprint, str) and isinstance(digest, bytes) and isinstance(vector, bytes)):
        return False
    return _checksum(fingerprint, digest, vector) == checksum


def _now() -> int:
    return int(time.time() // USE_SECONDS)


def _count(connection: sqlite3.Connection) -> int:
    return connection.execute("SELECT count(*) FROM sentences").fetchone()[0]


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _evict(connection: sqlite3.Connection, max_bytes: int) -> None:
    """Removes the least recently used until no more than `max_bytes` are used."""
    while (count := _count(connection)) and (used := _used_bytes(connection)) > max_bytes:
        share = max(1, count * (used - max_bytes) // used)
        connection.execute(
            "DELETE FROM sentences WHERE rowid IN (SELECT rowid FROM sentences ORDER BY used, rowid LIMIT ?)", (share,)
        )

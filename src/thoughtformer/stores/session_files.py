"""Sessions on disk: one safetensors file each, named by a digest of the session's name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from thoughtformer.cache.rows import RowsCache
from thoughtformer.cache.saving import restore_cache, saved_cache, write_saved
from thoughtformer.errors import CheckpointError, OutputError
from thoughtformer.files import is_being_written, is_draft

__all__ = ["SessionFiles", "key_of"]

SUFFIX = ".session"
KIND = "session"


class SessionFiles:
    """The files of one folder, which only the model that wrote them reads again.

    Args:
        folder: made if it isn't there; what a killed process left half written is removed.

    Raises:
        OutputError: the folder can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for draft in folder.glob(f".*{SUFFIX}*"):
                if is_draft(draft) and not is_being_written(draft):
                    draft.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"can't keep sessions in {folder}: {error.strerror or error}.") from None

    def has(self, key: str) -> bool:
        """Whether there is a file."""
        file = self._file(key)
        try:
            return file.exists()
        except OSError as error:
            raise OutputError(f"can't look for {file}: {error.strerror or error}.") from None

    def write(self, key: str, model: str, ids: Sequence[int], num_read: int, cache: RowsCache) -> None:
        """Writes a session, whole or not at all.

        Args:
            key: see `key_of`.
            model: its identity.
            ids: of the text.
            num_read: of these, how many `cache` has.
            cache: of one row.
        """
        manifest = {"session": key, "model": model, "num_read": num_read}
        write_saved(self._file(key), KIND, manifest, saved_cache(cache, ids))

    def read(
        self,
        key: str,
        model: str,
        cache: RowsCache,
        *,
        vocab_size: int,
        check_history: Callable[[RowsCache, Sequence[int]], None],
    ) -> tuple[list[int], int]:
        """Fills an empty cache of one row; returns the text's ids, and how many of them the cache has.

        Raises:
            CheckpointError: a file that is damaged, or another model's.
        """
        made_by = {"session": key, "model": model}
        try:
            return restore_cache(
                self._file(key), KIND, cache, made_by, vocab_size=vocab_size, check_history=check_history
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error} Delete the session, or serve the model that it is of.") from None

    def remove(self, key: str) -> None:
        """Removes a session's file, if there is one."""
        file = self._file(key)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"can't remove {file}: {error.strerror or error}.") from None

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def key_of(name: str) -> str:
    """A name for a file, whatever the session's name holds."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()

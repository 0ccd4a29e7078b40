"""Files and folders that take their name once whole, so that nothing half-written stays."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thoughtformer.errors import OutputError

__all__ = ["new_file", "new_folder"]


def _make_parent(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't write to {out.parent}: {error}") from None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` at the end.

    Raises:
        OutputError: `out` is there and not an empty folder, or can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists. Name a new or empty folder.")
    _make_parent(out)
    draft: Path | None = None
    try:
        draft = Path(tempfile.mkdtemp(prefix=".writing-", dir=out.parent))
        yield draft
        draft.replace(out)
    except OSError as error:
        raise OutputError(f"couldn't write {out}: {error}") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def new_file(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """The path of a file to write, which takes the name `out` at the end.

    Raises:
        OutputError: `out` is there and `replace` isn't asked for, or it can't be written.
    """
    if out.is_dir() or (out.exists() and not replace):
        raise OutputError(f"{out} exists. Name a new file.")
    _make_parent(out)
    draft = out.with_name(f".{out.name}.writing-{os.getpid()}-{threading.get_ident()}")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())  # or a power cut might leave the name with nothing behind it
        draft.replace(out)
    except OSError as error:
        raise OutputError(f"couldn't write {out}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)

"""What lies on disk: written whole or not at all, and not believed when read.

Files and folders take their name once whole, so that nothing half-written stays. A sealed folder has a file beside the
others that says how long each is and what its digest is, its own included.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thoughtformer.errors import CheckpointError, InputError, OutputError

__all__ = [
    "SEAL",
    "check_seal",
    "is_draft",
    "new_file",
    "new_files",
    "new_folder",
    "read_json",
    "read_sealed_json",
    "seal",
    "sealed_json",
]

#: The file of a sealed folder that tells of the others.
SEAL = "digests.json"
CHUNK_BYTES = 1 << 20


def read_json(file: Path, what: str, *, kind: type[InputError] = CheckpointError) -> dict[str, Any]:
    """The object that a JSON file of ours holds.

    Args:
        file: where it is.
        what: what it should be, for the message: "the recipe to resume".
        kind: of the error.

    Raises:
        InputError: of that kind; the file is missing, unreadable, no UTF-8, no JSON, or no object.
    """
    try:
        values = json.loads(file.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise kind(f"{file} isn't there, {what}.") from None
    except OSError as error:
        raise kind(f"can't read {file}, {what}: {error.strerror or error}.") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise kind(f"{file}, {what}, is damaged: {error}.") from None
    if not isinstance(values, dict):
        raise kind(f"{file}, {what}, holds a {type(values).__name__}, not an object.")
    return values


def sealed_json(values: dict[str, Any]) -> str:
    """The text of a JSON file that carries a digest of its own; see `read_sealed_json`."""
    return json.dumps(values | {"digest": json_digest(values)}, indent=2) + "\n"


def read_sealed_json(file: Path, what: str, *, kind: type[InputError] = CheckpointError) -> dict[str, Any]:
    """As `read_json`, of a file that `sealed_json` made, without the digest; raises if it is another."""
    values = read_json(file, what, kind=kind)
    digest = values.pop("digest", None)
    if digest != json_digest(values):
        raise kind(f"{file}, {what}, is damaged: its digest is wrong.")
    return values


def json_digest(values: Any) -> str:
    """32 hexadecimal digits of plain values, however they are written."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Writes down the length and digest of every file in a folder, or of those named; to be done last."""
    files = _files(folder) if names is None else sorted(names)
    told = {name: [(folder / name).stat().st_size, _file_digest(folder / name)] for name in files}
    values = {"version": 1, "files": told}
    (folder / SEAL).write_text(sealed_json(values), encoding="utf-8")


def check_seal(folder: Path, what: str, *, kind: type[InputError] = CheckpointError) -> None:
    """Raises an error of `kind` unless the folder is as it was sealed; further files in it are nobody's business."""
    values = read_sealed_json(folder / SEAL, f"what {what} consists of", kind=kind)
    if values.get("version") != 1:
        raise kind(f"{folder / SEAL}, what {what} consists of, has version {values.get('version')}; this is 1.")
    files = values.get("files")
    if not isinstance(files, dict) or not all(isinstance(told, list) and len(told) == 2 for told in files.values()):
        raise kind(f"{folder / SEAL}, what {what} consists of, lists no files: made by something else.")
    for name, (size, file_digest) in files.items():
        file = folder / name
        try:
            is_same = file.stat().st_size == size and _file_digest(file) == file_digest
        except OSError as error:
            raise kind(f"{file} of {what} can't be read: {error.strerror or error}.") from None
        if not is_same:
            raise kind(f"{file} isn't what it was when {what} was written: damaged, or edited.")


def _files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != SEAL)


def _file_digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
def new_files(out: Path, *, draft_name: str, last: str) -> Iterator[Path]:
    """A folder inside `out` to fill, whose files then take their names in `out` one by one, that called `last` last.

    For folders that hold other files already: where `last` is, all are there.

    Raises:
        OSError: as writing and moving does.
    """
    draft = out / draft_name
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in sorted(draft.iterdir(), key=lambda path: path.name == last):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def is_draft(path: Path) -> bool:
    """Whether a file is what `new_file` was writing when its process was killed, or still is."""
    return path.name.startswith(".") and ".writing-" in path.name


def is_being_written(draft: Path) -> bool:
    """Whether the process that began a draft of `new_file`'s still runs; one of another machine is taken for ended."""
    process = draft.name.rpartition(".writing-")[2].partition("-")[0]
    if not process.isdigit():
        return False
    if os.name == "nt":  # there a signal of number 0 would end it
        return True
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


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

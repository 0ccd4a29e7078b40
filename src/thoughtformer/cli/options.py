"""Options that commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from thoughtformer.errors import InputError

__all__ = ["AsJson", "Column", "Data", "Extrapolate", "Model", "Threads", "read_text", "set_threads", "shown_size"]

Model = Annotated[str, typer.Option("--model", "-m", help="tiny-gpthf, tiny-gpt, or a model's folder.")]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        help="File (.txt, .md, .jsonl, .parquet, also .gz, .xz, .bz2, .zst), folder, or datasets:NAME; one or more.",
    ),
]
Column = Annotated[str, typer.Option(help="Column that holds the text, in .jsonl, .parquet and datasets.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Extrapolate = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Take texts longer than the model was trained for.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: one a core.", min=1)]


def read_text(path: Path) -> str:
    """A text file's content, or standard input's for `-`, line breaks as they are; raises `InputError`."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from None
    if b"\0" in content:
        raise InputError(f"{path} holds a zero byte: it is binary, not text.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): binary, or another encoding.") from None


def shown_size(num_bytes: float) -> str:
    """Bytes in kB, MB or GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


def set_threads(threads: int | None) -> None:
    """Sets torch's threads, if asked to."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


class TokenisingStatus:
    """A line on standard error that says how much text was read; `told` and `stop` are for a training run to call.

    Says after an interruption how the run in `out` goes on.
    """

    def __init__(self, out: Path, save_every_steps: int) -> None:
        from rich.console import Console

        self.out = out
        self.save_every_steps = save_every_steps
        self.console = Console(stderr=True, highlight=False)
        self._status = self.console.status("reading the data")
        self._num_bytes = 0

    def told(self, documents: int, size: int) -> None:
        """One more document, of so many bytes."""
        self._num_bytes += size
        self._status.update(f"tokenising: {documents:,} documents, {self._num_bytes / 1e6:,.1f} MB")

    def stop(self) -> None:
        """The text is ready."""
        self._status.stop()

    def _interrupted(self) -> None:
        """Says how the run goes on."""
        out, every = self.out, self.save_every_steps
        checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        self.console.print(
            f"{out}: go on after {checkpoints[-1].name} with --resume."
            if checkpoints
            else f"{out}: no checkpoint yet, there is one every {every:,} steps (save_every_steps). Start anew with "
            "--overwrite."
        )

    def __enter__(self) -> TokenisingStatus:
        self._status.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._status.stop()
        if kind is KeyboardInterrupt:
            self._interrupted()

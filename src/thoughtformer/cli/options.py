"""Options that commands share."""

from __future__ import annotations

import codecs
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from thoughtformer.errors import InputError, nearest
from thoughtformer.names import BENCH_CASES, BUNDLED_ADAPTERS, DRAFTER_NAMES, METHOD_NAMES, nearest_method, resolve

if TYPE_CHECKING:
    from thoughtformer.train.settings import TrainingPlan

__all__ = [
    "DATA",
    "AsJson",
    "Column",
    "Data",
    "Drafts",
    "Encoding",
    "Extrapolate",
    "Model",
    "Threads",
    "Working",
    "check_adapter",
    "check_cases",
    "check_method",
    "check_methods",
    "check_model",
    "check_source",
    "counted",
    "read_text",
    "set_threads",
    "shown_size",
]

#: Where nothing is a terminal, a line that often.
SECONDS_BETWEEN_LINES = 8.0


def check_model(name: str | None) -> str | None:
    """A callback: a model that isn't there is told before anything heavy is imported."""
    if name is not None:
        resolve(name)
    return name


def _check_drafts(names: str) -> str:
    """A callback: what can't draft is told before anything heavy is imported."""
    for name in names.split(","):
        kind, _, argument = name.strip().partition(":")
        if kind != "off" and kind not in DRAFTER_NAMES:
            raise InputError(f"--drafts {name!r} is unknown.{nearest(kind, ['off', *DRAFTER_NAMES])}")
        if kind == "model" and argument:
            resolve(argument)
    return names


def check_source(source: str) -> None:
    """Raises `InputError` for text that isn't there, before anything heavy is imported."""
    if source and not source.startswith("datasets:") and not Path(source).exists():
        raise InputError(f"no file or folder {source!r}. For a data set of a hub, write datasets:NAME.")


def check_adapter(name: str | None) -> str | None:
    """A callback, the same for an adapter; an empty name is none."""
    if name:
        resolve(name, BUNDLED_ADAPTERS)
    return name


def check_methods(names: str) -> str:
    """A callback, the same for compression methods with commas between, or all."""
    for name in names.split(","):
        if names != "all" and name not in METHOD_NAMES:
            raise InputError(f"--methods: unknown method {name!r}.{nearest_method(name)}")
    return names


def check_method(name: str | None) -> str | None:
    """A callback, the same for one method."""
    if name is not None and name not in METHOD_NAMES:
        raise InputError(f"--method: unknown method {name!r}.{nearest_method(name)}")
    return name


def check_cases(theme: str) -> Callable[[list[str] | None], list[str] | None]:
    """A callback, the same for the cases of a benchmark."""

    def check(names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in BENCH_CASES[theme]:
                raise InputError(f"--case {name!r} is unknown.{nearest(name, BENCH_CASES[theme])}")
        return names

    return check


def _check_encoding(name: str) -> str:
    try:
        codecs.lookup(name)
    except LookupError:
        raise InputError(f"--encoding {name!r} is none that Python knows, as utf-8 or latin-1 are.") from None
    return name


Model = Annotated[
    str, typer.Option("--model", "-m", help="tiny-gpthf, tiny-gpt, or a model's folder.", callback=check_model)
]
Encoding = Annotated[str, typer.Option(help="Of text files.", callback=_check_encoding)]
DATA = typer.Option(
    "--data",
    "-d",
    help="File (.txt, .md, .jsonl, .parquet, also .gz, .xz, .bz2, .zst), folder, or datasets:NAME; one or more.",
)
Data = Annotated[list[str], DATA]
Column = Annotated[str, typer.Option(help="Column that holds the text, in .jsonl, .parquet and datasets.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Extrapolate = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Take texts longer than the model was trained for.")
]
Drafts = Annotated[
    str,
    typer.Option(
        help="What proposes tokens, several of which are then read at once: off, suffix, model:NAME (a smaller model), "
        "or several with commas. The text is the same.",
        callback=_check_drafts,
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: one a core.", min=1)]


def counted(number: int, what: str) -> str:
    """`1 document`, `1,200 documents`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A text file's content, or standard input's for `-`, line breaks as they are; raises `InputError`."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from None
    if b"\0" in content and not encoding.lower().replace("-", "").startswith(("utf16", "utf32")):
        raise InputError(f"{path} holds a zero byte: it is binary, not text.")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {encoding.upper()} text (byte {error.start}): binary, or of another encoding, which "
            "--encoding names."
        ) from None


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


class Working:
    """Says on standard error what is under way: in a terminal a line that changes, elsewhere one every few seconds."""

    def __init__(self, what: str) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self._text = what
        self._started = time.monotonic()
        self._is_over = threading.Event()
        self._status = self.console.status(what) if self.console.is_terminal else None
        self._thread = None if self._status is not None else threading.Thread(target=self._say, daemon=True)

    def update(self, text: str) -> None:
        """What is under way now."""
        self._text = text
        if self._status is not None:
            self._status.update(text)

    def stop(self) -> None:
        """Says no more."""
        self._is_over.set()
        if self._status is not None:
            self._status.stop()
        elif self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _say(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_LINES):
            self.console.print(f"{self._text} ({time.monotonic() - self._started:.0f} s)")

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        else:
            assert self._thread is not None
            self._thread.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.stop()


class TrainingStatus(Working):
    """`Working` for a training run: what it reads, what it is going to do, and how it goes on when interrupted."""

    def __init__(self, out: Path, save_every_steps: int) -> None:
        super().__init__("reading the data")
        self.out = out
        self.save_every_steps = save_every_steps
        self._num_bytes = 0

    def told(self, documents: int, size: int) -> None:
        """One more document, of so many bytes."""
        self._num_bytes += size
        self.update(f"tokenising: {counted(documents, 'document')}, {self._num_bytes / 1e6:,.1f} MB")

    def begins(self, plan: TrainingPlan) -> None:
        """The text is ready."""
        self.stop()
        self.console.print(
            f"{self.out}: {counted(plan.trained_parameters, 'parameter')} to train of {plan.parameters:,}, on "
            f"{plan.device}; {counted(plan.corpus_tokens, 'token')} of text; {counted(plan.steps, 'step')} of "
            f"{counted(plan.tokens_per_step, 'token')}, a checkpoint every {plan.save_every_steps:,}"
        )

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

    def __exit__(self, kind: object, *error: object) -> None:
        super().__exit__(kind, *error)
        if kind is KeyboardInterrupt:
            self._interrupted()

"""Results as JSON lines: one line a peer and workload, with what is needed to judge and repeat it.

{"theme": "speed", "case": "prefill", "peer": "gpt", "workload": {"batch": 1, "context": 4096},
 "metrics": {"seconds": {"median": 5.9, "low": 5.8, "high": 6.1, "runs": 5}}, "environment": {}, "command": "..."}
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from thoughtformer.errors import InputError, OutputError

__all__ = ["Record", "Spread", "append_records", "environment", "read_records"]

PACKAGES = ("thoughtformer", "torch", "transformers", "peft", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over repeated runs: median, smallest and largest; and each run's, where it has a pair elsewhere."""

    median: float
    low: float
    high: float
    runs: int
    values: Sequence[float] = ()

    @classmethod
    def of(cls, values: Sequence[float], *, keep: bool = False) -> Spread:
        """Of some values, which it keeps if told to."""
        return cls(
            median=statistics.median(values),
            low=min(values),
            high=max(values),
            runs=len(values),
            values=tuple(values) if keep else (),
        )

    def to_plain(self) -> dict[str, Any]:
        """Its fields, without what is empty."""
        return {name: value for name, value in asdict(self).items() if name != "values" or value}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one peer did on one workload.

    Attributes:
        theme: speed, memory, flops or quality.
        case: what was done, within the theme.
        peer: who did it.
        workload: settings that all peers of a comparison share.
        metrics: figures by name; units are in the names.
        settings: the peer's own: layers, cache, method.
        skipped: why there are no figures.
        environment, command: where, and by what.
    """

    theme: str
    case: str
    peer: str
    workload: dict[str, Any]
    metrics: dict[str, Spread] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def name(self) -> str:
        """Of what was measured, wherever and whenever that was."""
        return json.dumps([self.theme, self.case, self.peer, self.workload, self.settings], sort_keys=True)

    def to_json(self) -> str:
        plain = {"metrics": {name: spread.to_plain() for name, spread in self.metrics.items()}}
        return json.dumps({**asdict(replace(self, metrics={})), **plain}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record in a line; raises `InputError`."""
        try:
            values = json.loads(line)
            metrics = {name: Spread(**spread) for name, spread in values.pop("metrics").items()}
            figures = [value for spread in metrics.values() for value in (spread.median, *spread.values)]
            if not all(math.isfinite(value) for value in figures):
                raise ValueError("a figure is not finite")
            return cls(metrics=metrics, **values)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"not a line of `thoughtformer bench`: {line[:80]!r} ({error}).") from None


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Adds lines to a file in one write; raises `OutputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(record.to_json() + "\n" for record in records))
    except OSError as error:
        raise OutputError(f"can't write to {path}: {error.strerror or error}") from None


def read_records(paths: Iterable[Path]) -> list[Record]:
    """All lines of files, and of folders' .jsonl files, in order; raises `InputError`."""
    records = []
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        for file in files:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"can't read {file}: {error}") from None
            records += [Record.from_json(line) for line in lines if line.strip()]
    return records


def environment(**more: Any) -> dict[str, Any]:
    """What a reader needs to judge a figure: versions, commit, processor, threads."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        **more,
    }


def command_line() -> str:
    """The command that is running, without where its program lies, its inputs lie, and its lines and models go."""
    parts: list[str] = []
    for part in sys.argv[1:]:
        if parts and parts[-1] in ("--out", "--work"):
            parts.pop()
        elif not part.startswith(("--out=", "--work=")):
            parts.append("/".join(Path(part).parts[-2:]) if Path(part).is_absolute() else part)
    module = getattr(sys.modules["__main__"].__spec__, "parent", None)
    program = f"python -m {module}" if (module or "").startswith("benchmarks.") else "thoughtformer"
    return " ".join([program, *parts])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The source's git commit, with `+changes` where files differ from it; None where it isn't a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an environment inside another checkout is not one
        # Of the package, and of what measures it in a checkout; results change all the time.
        places = (str(folder.parent), ":(top)benchmarks/*.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *places)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None

"""A peer in a process of its own: one JSON object a line to it, one back."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from thoughtformer.errors import ThoughtformerError

__all__ = ["PeerError", "PeerProcess"]


class PeerError(ThoughtformerError):
    """A peer's process failed."""


class PeerProcess:
    """Runs a worker file under another Python, and asks it things in turn; in between it waits, at no cost."""

    def __init__(self, python: Path, worker: str, *, threads: int) -> None:
        #: What the program says of itself, its version first of all.
        self.about: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115  closed with the process
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).parent / worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The worker's answer; raises `PeerError` with its last words if it failed."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait()
            self._errors.seek(0)
            words = self._errors.read().strip()[-500:]
            raise PeerError(f"the peer's process ended with {process.returncode}: {words}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

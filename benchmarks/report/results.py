"""Results as tables and pictures take them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from thoughtformer.bench.at_bytes import summary
from thoughtformer.bench.records import Record, read_records

__all__ = ["read_results"]


def read_results(paths: Iterable[Path]) -> list[Record]:
    """All lines of files and folders; of what is measured text by text, what it comes to. Raises `InputError`."""
    lines = read_records(paths)
    return [*(line for line in lines if line.case != "at_bytes"), *summary(lines)]

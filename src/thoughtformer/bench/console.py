"""Records as a terminal shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from thoughtformer.bench.records import Record, Spread

__all__ = ["console_table", "shown"]


def shown(name: str, spread: Spread) -> str:
    """A figure in its unit, with its range where runs differ."""
    scale, unit, digits = 1.0, "", 3
    if name.endswith("bytes_per_second"):
        scale, unit, digits = 1e9, " GB/s", 1
    elif name.endswith("bytes"):
        scale, unit, digits = 1e6, " MB", 2
    elif name.endswith("flops"):
        scale, unit, digits = (1e12, " TFLOPs", 4) if spread.median >= 1e10 else (1e6, " MFLOPs", 2)
    elif name.endswith("seconds"):
        scale, unit, digits = (1.0, " s", 2) if spread.median >= 1 else (1e-3, " ms", 1)
    elif name.endswith(("per_byte", "nats")):
        digits = 4
    elif name.endswith(("per_second", "entries")):
        digits = 1
    middle, low, high = (f"{value / scale:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{middle}{unit}" if low == high else f"{middle} [{low}, {high}]{unit}"


def console_table(case: str, records: Sequence[Record]) -> None:
    """Prints a case's records: one row each."""
    from rich.console import Console
    from rich.table import Table

    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    varying = [
        name
        for name in dict.fromkeys(name for record in records for name in record.workload)
        if len({json.dumps(record.workload.get(name)) for record in records}) > 1
    ]
    table = Table(title=case)
    for heading in ("peer", *varying, *metrics):
        table.add_column(heading.replace("_", " "), justify="left" if heading == "peer" else "right")
    for record in records:
        if record.skipped is not None:
            figures = [f"skipped: {record.skipped}", *[""] * (len(metrics) - 1)][: max(len(metrics), 1)]
        else:
            figures = [shown(name, record.metrics[name]) if name in record.metrics else "" for name in metrics]
        table.add_row(record.peer, *(str(record.workload.get(name, "")) for name in varying), *figures)
    console = Console()
    # Without a terminal rich takes 80 columns, and cuts figures to pieces.
    (console if console.is_terminal else Console(width=160)).print(table)

"""`python -m benchmarks.report`: results as a page, and as tables in the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report.page import write_report
from benchmarks.report.results import read_results
from benchmarks.report.tables import renew as renew_tables
from thoughtformer.cli import main
from thoughtformer.errors import InputError

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files of JSON lines, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and the pictures.")],
    renew: Annotated[
        list[Path] | None, typer.Option(help="Also renew the tables between this file's bench marks; repeatable.")
    ] = None,
) -> None:
    """One self-contained HTML page and PNGs from the JSON lines.

    Example: python -m benchmarks.report benchmarks/results --out report --renew README.md
    """
    records = read_results(results)
    if not records:
        raise InputError("the files hold no results. Measure first, e.g. thoughtformer bench speed --out speed.jsonl.")
    # Bits per byte are the same wherever they were counted.
    timed = [record for record in records if record.case not in ("bits", "at_bytes")]
    machines = sorted({str(record.environment.get("processor")) for record in timed})
    if len(machines) > 1:
        raise InputError(
            f"the files hold results of {len(machines)} machines ({', '.join(machines)}): report one at a time."
        )
    for path in write_report(records, out):
        print(path)
    for path in renew or ():
        renew_tables(path, records)
        print(path)


if __name__ == "__main__":
    main(app)

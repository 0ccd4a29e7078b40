"""`python -m benchmarks.study`: compare architectures at equal text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thoughtformer.cli import main
from thoughtformer.cli.bench import run_cases
from thoughtformer.cli.options import AsJson, Data, Threads, set_threads
from thoughtformer.errors import InputError, nearest

app = typer.Typer(
    help="Train architectures on the same text, and compare them.", pretty_exceptions_enable=False, add_completion=False
)


@app.command("run")
def run(
    group: Annotated[
        str, typer.Argument(help="Rows: learning-rates, screen, seeds-1m, seeds-3m, long, equal-flops, largest, trial.")
    ],
    data: Data,
    valid: Annotated[list[str], typer.Option(help="Held-out text as NAME=FILE; repeatable.")],
    out: Annotated[Path, typer.Option(help="Finished rows, as JSON lines; those in it are skipped.")],
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and models.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this variant; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after so many rows.", min=1)] = None,
    threads: Threads = None,
) -> None:
    """Train and score rows; run it again, or several at once with --threads 1, to go on.

    Example: python -m benchmarks.study run screen --data books/ --valid books=valid.txt --out study.jsonl --work runs/
    """
    from rich.console import Console

    from benchmarks.study.rows import rows_of
    from benchmarks.study.run import StudySettings, run_rows

    named: dict[str, str] = {}
    for name, path in map(_named, valid):
        if name in named:
            raise InputError(f"--valid names two texts {name!r}: {named[name]} and {path}.")
        named[name] = path
    rows = rows_of(group)
    for name in only or ():
        if name not in {row.variant for row in rows}:
            raise InputError(f"--only {name!r}: {group} has no such row.{nearest(name, {row.variant for row in rows})}")
    rows = [row for row in rows if not only or row.variant in only]
    set_threads(threads)
    console = Console(stderr=True, highlight=False)
    settings = StudySettings(data=data, valid=named, out=out, work=work, on_progress=console.print)
    count = run_rows(rows, settings, limit=limit)
    console.print(f"{out}: {count} rows added, of {len(rows)} asked for in {group}")


@app.command("speed")
def speed(
    size: Annotated[str, typer.Option(help="1m, 3m or 8m, the parameters of six layers.")] = "1m",
    context: Annotated[int, typer.Option(help="Tokens held when writing starts.", min=32)] = 4096,
    repeats: Annotated[int, typer.Option(help="Timed, interleaved rounds.", min=1)] = 5,
    compiled: Annotated[bool, typer.Option(help="Also one row with compiled steps; a minute a model.")] = True,
    out: Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure what writing and training cost the finalists: text tokens a second, FLOPs, bytes held.

    Example: python -m benchmarks.study speed --size 1m --out speed.jsonl
    """
    from benchmarks.study.speed import CASES, StudySpeed

    options = StudySpeed(size=size, context=context, repeats=repeats, compiles=compiled)
    set_threads(threads)
    run_cases(CASES, None, options, out, as_json)


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise InputError(f"--valid {text!r}: write NAME=FILE, e.g. books=valid.txt.")
    return name, path


if __name__ == "__main__":
    main(app)

"""The command line, one file a command. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from thoughtformer import __version__
from thoughtformer.cli.bench import bench_app
from thoughtformer.cli.compress import compress_app
from thoughtformer.cli.convert import convert_app
from thoughtformer.cli.demo import demo
from thoughtformer.cli.evaluate import evaluate
from thoughtformer.cli.generate import generate
from thoughtformer.cli.info import info
from thoughtformer.cli.serve import serve
from thoughtformer.cli.store import index, store_app
from thoughtformer.cli.tokenizer import tokenizer_app
from thoughtformer.cli.train import train
from thoughtformer.errors import ThoughtformerError

__all__ = ["app", "main"]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="thoughtformer",
    help="Language models that fold their context: GPTHF, and sentinel tokens for any causal LM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _about(
    # A callback of the option's own: the command's is run only once there is a command to run.
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


app.command("demo")(demo)
app.command("generate")(generate)
app.command("serve")(serve)
app.command("index")(index)
app.add_typer(store_app, name="store")
app.command("train")(train)
app.command("eval")(evaluate)
app.add_typer(tokenizer_app, name="tokenizer")
app.command("info")(info)
app.add_typer(compress_app, name="compress")
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")


def _one_flag_a_value(arguments: list[str], flags: tuple[str, ...]) -> list[str]:
    """`--data a b` as `--data a --data b`, so that a shell's `--data books/*.txt` works."""
    expanded: list[str] = []
    flag = None
    for argument in arguments:
        if argument.startswith("-"):
            flag = argument if argument in flags else None
        elif flag is not None and expanded[-1] != flag:
            expanded.append(flag)
        expanded.append(argument)
    return expanded


def main(command: typer.Typer = app) -> NoReturn:
    """Runs a command; a user's mistake prints one line on standard error and exits with 2."""
    # Only a data set of a hub needs a network, and progress bars of libraries don't belong into the output.
    if not any("datasets:" in argument for argument in sys.argv):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        sys.argv[1:] = _one_flag_a_value(sys.argv[1:], ("--data", "-d"))
        command()
    except ThoughtformerError as error:
        print(f"thoughtformer: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (KeyboardInterrupt, SystemExit) as stopped:
        # typer makes an exit of its own of an interruption, and says nothing.
        if isinstance(stopped, SystemExit) and stopped.code != EXIT_INTERRUPTED:
            raise
        print("thoughtformer: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)

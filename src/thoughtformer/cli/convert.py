"""`thoughtformer convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert_app"]

convert_app = typer.Typer(help="Bring checkpoints of other formats into a folder that transformers loads.")


@convert_app.callback()
def _group() -> None:
    """Bring checkpoints of other formats into a folder that transformers loads."""


@convert_app.command("llama2c")
def llama2c(
    weights: Annotated[Path, typer.Option(help="Checkpoint of llama2.c, e.g. stories260K.bin.")],
    tokenizer: Annotated[Path, typer.Option(help="Its tokenizer, e.g. tok512.bin.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
) -> None:
    """Convert a checkpoint of llama2.c.

    Example: thoughtformer convert llama2c --weights stories260K.bin --tokenizer tok512.bin --out stories260K
    """
    from thoughtformer.models.llama2c import convert_llama2c

    convert_llama2c(weights, tokenizer, out)
    print(f"{out}: a Llama of transformers")

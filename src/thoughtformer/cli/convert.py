"""`thoughtformer convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thoughtformer.cli.options import Model, Working

__all__ = ["convert_app"]

convert_app = typer.Typer(help="Bring in checkpoints of other formats, and export plain GPTs to them.")


@convert_app.callback()
def _group() -> None:
    """Bring in checkpoints of other formats, and export plain GPTs to them."""


@convert_app.command("llama2c")
def llama2c(
    weights: Annotated[Path, typer.Option(help="Checkpoint of llama2.c, e.g. stories260K.bin.")],
    tokenizer: Annotated[Path, typer.Option(help="Its tokenizer, e.g. tok512.bin.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
) -> None:
    """Convert a checkpoint of llama2.c.

    Example: thoughtformer convert llama2c --weights stories260K.bin --tokenizer tok512.bin --out stories260K
    """
    from thoughtformer.convert.llama2c import convert_llama2c

    with Working(f"converting {weights}"):
        convert_llama2c(weights, tokenizer, out)
    print(f"{out}: a Llama of transformers")


@convert_app.command("llama")
def llama(
    out: Annotated[Path, typer.Option(help="New folder.")],
    model: Model = "tiny-gpt",
) -> None:
    """Export a plain GPT as a Llama, for transformers, vLLM and others.

    Example: thoughtformer convert llama --model tiny-gpt --out tiny-llama
    """
    from thoughtformer.convert.llama import export_llama
    from thoughtformer.models.loading import load_gpthf

    with Working(f"exporting {model}"):
        export_llama(*load_gpthf(model), out)
    print(f"{out}: a Llama of transformers")


@convert_app.command("gguf")
def gguf(
    out: Annotated[Path, typer.Option(help="New file.")],
    model: Model = "tiny-gpt",
) -> None:
    """Export a plain GPT to GGUF in float32, for llama.cpp.

    Example: thoughtformer convert gguf --model tiny-gpt --out tiny-gpt.gguf
    """
    from thoughtformer.convert.gguf import write_gguf
    from thoughtformer.models.loading import load_gpthf

    with Working(f"exporting {model}"):
        write_gguf(*load_gpthf(model), out)
    print(f"{out}: a model of llama.cpp")

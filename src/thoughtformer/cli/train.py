"""`thoughtformer train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thoughtformer.cli.options import (
    Column,
    Data,
    Encoding,
    Threads,
    TrainingStatus,
    check_source,
    counted,
    set_threads,
)
from thoughtformer.errors import ConfigError, nearest
from thoughtformer.names import RECIPE_NAMES

__all__ = ["train"]


def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="New or empty folder for the model and its checkpoints.")],
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="tiny-gpthf or tiny-gpt.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Recipe in a YAML or JSON file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of the recipe: epochs=2, model.hidden_size=384.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    column: Column = "text",
    encoding: Encoding = "utf-8",
    threads: Threads = None,
) -> None:
    """Train a model from a recipe; the same command runs under torchrun.

    Example: thoughtformer train --recipe tiny-gpthf --data books/ --out runs/mine --set max_bytes=50000000
    """
    if (recipe is None) == (config is None):
        raise ConfigError("give the recipe as either --recipe NAME or --config FILE.")
    if recipe is not None and recipe not in RECIPE_NAMES:
        raise ConfigError(f"no recipe {recipe!r}.{nearest(recipe, RECIPE_NAMES)}")
    for source in data:
        check_source(source)

    from thoughtformer.recipes import recipe as named_recipe
    from thoughtformer.train.recipe import Recipe

    chosen = named_recipe(recipe) if recipe is not None else Recipe.from_file(config or "")
    chosen = chosen.with_settings(settings or [])

    from thoughtformer.train.folder import RESULT_FILE
    from thoughtformer.train.run import train as run

    set_threads(threads)
    was_finished = resume and (out / RESULT_FILE).exists()
    with TrainingStatus(out, chosen.save_every_steps) as status:
        result = run(
            chosen,
            data,
            out,
            resume=resume,
            overwrite=overwrite,
            column=column,
            encoding=encoding,
            on_tokenised=status.told,
            on_start=status.begins,
        )
    status.console.print(
        f"{out}{', finished before' if was_finished else ''}: {counted(result.steps, 'step')}, "
        f"{counted(result.tokens, 'token')}, loss {result.last_loss or result.mean_loss:.4f}, "
        f"{result.seconds / 60:.1f} minutes"
    )

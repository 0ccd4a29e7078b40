"""A run's folder: made ready, remembered, and never mixed with another run's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from thoughtformer.errors import ConfigError, OutputError
from thoughtformer.files import check_seal, is_draft, new_file, new_files, read_json, read_sealed_json
from thoughtformer.text.packing import TokenisedCorpus
from thoughtformer.train.settings import RunSettings
from thoughtformer.train.trainer import DRAFT_FOLDER

__all__ = [
    "DATA_FILE",
    "RECIPE_FILE",
    "RESULT_FILE",
    "finished_result",
    "prepare_output",
    "same_data",
    "written_whole",
]

RECIPE_FILE = "recipe.json"
RESULT_FILE = "training.json"
DATA_FILE = "data.json"


def prepare_output(out: Path, recipe: RunSettings, *, resume: bool, overwrite: bool) -> str | None:
    """Makes the folder ready; returns the checkpoint to resume from."""
    if resume and overwrite:
        raise OutputError("--resume and --overwrite exclude each other: go on with the run, or remove it.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder.")
    # What a run leaves that never began, because its data couldn't be read, is nothing to keep.
    is_used = out.is_dir() and any(
        path.name not in (RECIPE_FILE, DATA_FILE) and not is_draft(path) for path in out.iterdir()
    )
    holds_run = (out / RECIPE_FILE).exists()
    if int(os.environ.get("RANK", "0")) != 0:
        return get_last_checkpoint(str(out)) if resume and out.is_dir() else None
    if is_used and overwrite:
        if not holds_run:
            raise OutputError(f"{out} holds files, but no training run to overwrite. Give an empty folder.")
        for path in _run_files(out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif is_used and not resume:
        raise OutputError(
            f"{out} is not empty. Go on with --resume, replace its run with --overwrite, or name another."
        )
    elif resume:
        checkpoint = get_last_checkpoint(str(out)) if out.is_dir() else None
        if checkpoint is None and finished_result(out) is None:
            raise OutputError(
                f"{out} holds no checkpoint to resume from: start anew, with --overwrite if a run has begun there. "
                "save_every_steps says how often there is one."
            )
        _same_recipe(out, recipe)
        if checkpoint is not None:
            check_seal(Path(checkpoint), "the checkpoint", kind=OutputError)
        return checkpoint
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't write to {out}: {error}") from None
    with new_file(out / RECIPE_FILE, replace=True) as draft:
        draft.write_text(recipe.to_json() + "\n", encoding="utf-8")
    return None


def finished_result(out: Path) -> dict[str, Any] | None:
    """What the finished run in the folder wrote of itself; None if it hasn't finished."""
    file = out / RESULT_FILE
    if not file.exists():
        return None
    return read_sealed_json(file, "which says that the run has finished", kind=OutputError)


def same_data(out: Path, tokens: TokenisedCorpus, *, resume: bool, is_first: bool) -> None:
    """Remembers which ids the run reads, or refuses to resume on others; files may be copied or moved in between."""
    file = out / DATA_FILE
    identity = {"tokens": len(tokens.tokens), "documents": len(tokens), "digest": tokens.digest}
    if resume:
        before = read_json(file, "which says what the run was trained on", kind=OutputError)
        if before != identity:
            raise OutputError(
                f"the run in {out} reads other data: it had {before.get('documents')} documents of "
                f"{before.get('tokens')} tokens, these are {identity['documents']} of {identity['tokens']}, or their "
                "text has changed."
            )
    elif is_first:
        with new_file(file, replace=True) as draft:
            draft.write_text(json.dumps(identity) + "\n", encoding="utf-8")


def _run_files(out: Path) -> Iterator[Path]:
    names = {RECIPE_FILE, RESULT_FILE, DATA_FILE, "logs", DRAFT_FOLDER, "config.json", "generation_config.json"}
    names |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"}
    names |= {"adapter_model.safetensors", "sentinel.json", "sentinel.safetensors"}
    return (
        path
        for path in list(out.iterdir())
        if path.name in names or path.name.startswith("checkpoint-") or is_draft(path)
    )


def _same_recipe(out: Path, recipe: RunSettings) -> None:
    """Refuses to resume with another recipe; how often to log and save may change."""
    before = read_json(out / RECIPE_FILE, "the recipe to resume", kind=OutputError)
    with suppress(ConfigError):  # one that was written before some key was there means that key's default
        before = recipe.from_dict(before).to_dict()
    now = recipe.to_dict()
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in ("log_every_steps", "save_every_steps")
    ]
    if differing:
        raise OutputError(f"the run in {out} has another recipe: {'; '.join(differing)}.")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write results to, whose files move to `out` at the end, or never."""
    try:
        # The result last: where it is, the run has finished.
        with new_files(out, draft_name=DRAFT_FOLDER, last=RESULT_FILE) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"couldn't write the results to {out}: {error}. Its checkpoints are whole; make room and go on with "
            "--resume."
        ) from error

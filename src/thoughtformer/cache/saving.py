"""One file format for what a model holds of a text: contexts, and sessions.

A safetensors file, whose metadata has one entry: a JSON object with the format's version, the kind of file, a manifest
of plain values, and a digest over all of that and over every tensor's name, shape, type and bytes. Whatever differs
from what was written is refused; nothing of a file is used before its digest is checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from thoughtformer.cache.rows import RowsCache
from thoughtformer.errors import CheckpointError
from thoughtformer.files import new_file

__all__ = ["read_saved_manifest", "restore_cache", "saved_cache", "write_saved"]

FORMAT_VERSION = 2
KEY = "thoughtformer"
IDS = "ids"


def write_saved(path: Path, kind: str, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file, whole or not at all; one of that name is replaced.

    Args:
        path: its name.
        kind: `context` or `session`.
        manifest: plain values.
        tensors: by name.

    Raises:
        OutputError: it can't be written.
    """
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    values = {"version": FORMAT_VERSION, "kind": kind, "manifest": dict(manifest)}
    told = json.dumps(values | {"digest": _digest(values, saved)})
    with new_file(path, replace=True) as draft:
        # Not save_file: that makes a temporary file of its own, which stays if the process is killed.
        draft.write_bytes(save(saved, metadata={KEY: told}))


def read_saved_manifest(path: Path, kind: str) -> dict[str, Any]:
    """What a file says of itself, checked against its own digest.

    Raises:
        CheckpointError: a file that is missing, damaged, or of another kind or format.
    """
    return _read(path, kind)[0]


def _read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told is None:
            raise CheckpointError(f"{path} is a safetensors file, but no {kind} of this format.")
        values = json.loads(told)
        digest = values.pop("digest", None)
        if values.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has version {values.get('version')}, this is {FORMAT_VERSION}: make the {kind} anew."
            )
        if values.get("kind") != kind:
            raise CheckpointError(f"{path} is a {values.get('kind')}, not a {kind}.")
        if digest != _digest(values, tensors):
            raise CheckpointError(f"{path} is damaged: its digest is wrong. Make the {kind} anew.")
        return dict(values["manifest"]), tensors
    except FileNotFoundError:
        raise CheckpointError(f"there is no {kind} {path}.") from None
    except CheckpointError:
        raise
    # safetensors and torch have errors of many kinds for files that aren't theirs.
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged, or no {kind}: {error}.") from None


def saved_cache(cache: RowsCache, ids: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a cache of one row, and the ids that it was made of."""
    return cache.saved() | {IDS: torch.tensor(list(ids), dtype=torch.int64)}


def restore_cache(
    path: Path,
    kind: str,
    cache: RowsCache,
    made_by: Mapping[str, Any],
    *,
    vocab_size: int,
    check_history: Callable[[RowsCache, list[int]], None],
) -> tuple[list[int], int]:
    """Fills an empty cache of one row from a file; returns the text's ids, and how many of them the cache has read.

    Args:
        path: the file.
        kind: of which it must be.
        cache: empty, of the model that goes on with it.
        made_by: what the manifest must say under these names.
        vocab_size: ids must be below it.
        check_history: the model's; raises `ValueError` if what is held can't have come of these ids.

    Raises:
        CheckpointError: a file that is missing, damaged, foreign, or whose counters contradict what it holds.
    """
    manifest, tensors = _read(path, kind)
    differing = [
        f"{name} was {manifest.get(name)!r}, is {value!r}"
        for name, value in made_by.items()
        if manifest.get(name) != value
    ]
    if differing:
        raise CheckpointError(f"{path} was written by something else: {'; '.join(differing)}.")
    try:
        ids = tensors.pop(IDS).tolist()
        num_read = int(manifest["num_read"])
        if not all(0 <= token < vocab_size for token in ids) or not 0 <= num_read <= len(ids):
            raise ValueError(f"ids or counters are out of range (num_read {num_read} of {len(ids)})")
        cache.restore_saved(tensors)
        check_history(cache, ids[:num_read])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} contradicts itself: {error}. Make the {kind} anew.") from None
    return ids, num_read


def _digest(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""A text read once and asked many times: kept in memory, or in one file that is refused if it doesn't fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thoughtformer.attention.schedule import RowProgress
from thoughtformer.cache.compressed import CompressedCache
from thoughtformer.compression.compressed import CompressedModel
from thoughtformer.compression.policies import Callback
from thoughtformer.errors import CheckpointError, InputError, OutputError, UnsupportedError
from thoughtformer.models.writing import new_file

__all__ = ["Context", "read_manifest"]

FORMAT_VERSION = 1


class Context:
    """One text, as a compressed model holds it.

    Questions don't change it: `generate` works on a fork. The ids read are kept beside, four bytes each, because
    transformers' `generate` and its repetition penalty count them.
    """

    def __init__(self, compressed: CompressedModel, cache: CompressedCache, ids: Sequence[int]) -> None:
        self.compressed = compressed
        self.cache = cache
        self.ids = list(ids)

    @classmethod
    def read(cls, compressed: CompressedModel, ids: Sequence[int] | Int[Tensor, " tokens"]) -> Context:
        """Reads a text, in bounded memory."""
        context = cls(compressed, compressed.new_cache(1), [])
        context.append(ids)
        return context

    @torch.no_grad()
    def append(self, ids: Sequence[int] | Int[Tensor, " tokens"]) -> None:
        """Reads on."""
        new = _one_row(torch.as_tensor(ids, dtype=torch.long))
        if new.shape[1] == 0:
            raise InputError("no tokens to read.")
        real = torch.ones_like(new, dtype=torch.bool)
        self.compressed.read(new, real, self.cache, wanted=torch.zeros_like(real))
        self.ids += new[0].tolist()

    def fork(self) -> Context:
        """A copy that shares no storage with this one."""
        return Context(self.compressed, self.cache.fork(), self.ids)

    def num_bytes(self) -> int:
        """Bytes of all distinct storages held."""
        return self.cache.num_bytes()

    def generate(
        self, input_ids: Int[Tensor, "1 tokens"] | None = None, **settings: Any
    ) -> Int[Tensor, "returned new_tokens"]:
        """What the model writes after the context and `input_ids`; the context stays as it is.

        Args:
            input_ids: the question; at least one token.
            settings: as transformers' `generate` takes them.
        """
        if input_ids is None or input_ids.shape[-1] == 0:
            raise InputError("give at least one token after the context: the model continues from it.")
        question = _one_row(input_ids.cpu())
        whole = torch.cat([torch.tensor([self.ids]), question], dim=1).to(self.compressed.device)
        rows = max(settings.get("num_beams") or 1, settings.get("num_return_sequences") or 1)
        cache = self.cache.fork()
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        output = self.compressed.generate(  # type: ignore[attr-defined]
            whole, attention_mask=torch.ones_like(whole), past_key_values=cache, **settings
        )
        sequences = output if isinstance(output, Tensor) else output.sequences
        return sequences[:, whole.shape[1] :]

    def save(self, path: str | Path) -> None:
        """Writes the context to one file, whole or not at all.

        Raises:
            UnsupportedError: a policy that is a callback, which no file can hold.
            OutputError: the file can't be written.
        """
        path, method = Path(path), self.compressed.method
        if isinstance(getattr(method, "policy", None), Callback):
            raise UnsupportedError("a context folded by a callback can't be saved: no file can say how it goes on.")
        manifest = {
            "version": FORMAT_VERSION,
            **self.compressed.identity,
            "dtype": str(self.compressed.dtype).removeprefix("torch."),
            "progress": [asdict(row) for row in self.cache.rows],
            "num_columns": self.cache.num_columns,
        }
        tensors = self.cache.store.saved() | {"ids": torch.tensor(self.ids, dtype=torch.int32)}
        with new_file(path, replace=True) as draft:
            try:
                save_file(tensors, draft, metadata={"thoughtformer_context": json.dumps(manifest)})
            except SafetensorError as error:
                raise OutputError(f"couldn't write {path}: {error}") from error

    @classmethod
    def load(cls, compressed: CompressedModel, path: str | Path) -> Context:
        """A saved context, for the model, adapter, method and precision that wrote it.

        Raises:
            CheckpointError: a file that is missing, truncated, foreign, or written by another; says what differs.
        """
        path = Path(path)
        manifest = read_manifest(path)
        mine = {
            **compressed.identity,
            "dtype": str(compressed.dtype).removeprefix("torch."),
        }
        differing = [
            f"{name} was {manifest.get(name)!r}, is {mine[name]!r}" for name in mine if manifest.get(name) != mine[name]
        ]
        if differing:
            raise CheckpointError(f"{path} was written by something else: {'; '.join(differing)}.")
        try:
            with safe_open(path, framework="pt", device=str(compressed.device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            cache = compressed.new_cache(1)
            cache.rows = [RowProgress(**row) for row in manifest["progress"]]
            cache.num_columns = int(manifest["num_columns"])
            ids = tensors.pop("ids").tolist()
            cache.store.restore_saved(tensors)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or not what its manifest says: {error}") from error
        return cls(compressed, cache, ids)


def _one_row(ids: Tensor) -> Int[Tensor, "1 tokens"]:
    """Ids of one text, with or without a dimension of rows."""
    if ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        raise InputError(f"ids have shape {tuple(ids.shape)}; a context holds one text: (tokens,) or (1, tokens).")
    return ids.reshape(1, -1)


def read_manifest(path: str | Path) -> Mapping[str, Any]:
    """What a context's file says of itself; raises `CheckpointError`."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("thoughtformer_context")
    except FileNotFoundError:
        raise CheckpointError(f"there is no context {path}.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from None
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, but no context.")
    manifest = json.loads(text)
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has version {manifest.get('version')}; this is {FORMAT_VERSION}.")
    return manifest

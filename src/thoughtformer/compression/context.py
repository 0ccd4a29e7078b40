"""A text read once and asked many times: kept in memory, or in one file that is refused if it doesn't fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from thoughtformer.cache.compressed import CompressedCache
from thoughtformer.cache.saving import read_saved_manifest, restore_cache, saved_cache, write_saved
from thoughtformer.compression.model import CompressedModel
from thoughtformer.errors import CheckpointError, InputError, UnsupportedError

__all__ = ["Context", "read_manifest"]

KIND = "context"


class Context:
    """One text, as a compressed model holds it.

    Questions don't change it: `generate` works on a fork. The ids read are kept beside, four bytes each, because
    transformers' `generate` and its repetition penalty count them. What weights computed, other weights can't go on
    with: after an edit of the model's a context is refused.
    """

    def __init__(
        self, compressed: CompressedModel, cache: CompressedCache, ids: Sequence[int], *, weights: bytes | None = None
    ) -> None:
        self.compressed = compressed
        self.cache = cache
        self.ids = list(ids)
        self._weights = compressed.weights_state() if weights is None else weights

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
        return Context(self.compressed, self.cache.fork(), self.ids, weights=self._weights)

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

        Raises:
            InputError: nothing to go on with, or the model's weights have changed since the text was read.
        """
        self._check_weights()
        if input_ids is None or input_ids.shape[-1] == 0:
            raise InputError("give at least one token after the context: the model continues from it.")
        question = _one_row(input_ids.cpu())
        whole = torch.cat([torch.tensor([self.ids]), question], dim=1).to(self.compressed.device)
        rows = max(settings.get("num_beams") or 1, settings.get("num_return_sequences") or 1)
        cache = self.cache.fork()
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        output = self.compressed.generate(  # type: ignore[attr-defined]
            whole, attention_mask=torch.ones_like(whole), cache=cache, **settings
        )
        sequences = output if isinstance(output, Tensor) else output.sequences
        return sequences[:, whole.shape[1] :]

    def save(self, path: str | Path) -> None:
        """Writes the context to one file, whole or not at all.

        Raises:
            InputError: the model's weights have changed since the text was read.
            UnsupportedError: a policy that is a callback, which no file can hold.
            OutputError: the file can't be written.
        """
        if not self.compressed.method.can_save:
            raise UnsupportedError(
                f"a context of {self.compressed.method!r} can't be saved: no file can say how it goes on."
            )
        self._check_weights()
        manifest = _made_by(self.compressed) | {"num_read": len(self.ids)}
        write_saved(Path(path), KIND, manifest, saved_cache(self.cache, self.ids))

    @classmethod
    def load(cls, compressed: CompressedModel, path: str | Path) -> Context:
        """A saved context, for the model, adapter, method and precision that wrote it.

        Raises:
            CheckpointError: a file that is missing, damaged, foreign, or written by another; says what differs.
        """
        cache = compressed.new_cache(1)
        ids, num_read = restore_cache(
            Path(path),
            KIND,
            cache,
            _made_by(compressed),
            vocab_size=compressed.backbone.vocab_size,
            check_history=compressed.check_history,  # type: ignore[arg-type]
        )
        if num_read != len(ids):
            raise CheckpointError(f"{path} contradicts itself: it has read {num_read} of {len(ids)} ids. Make it anew.")
        return cls(compressed, cache, ids)

    def _check_weights(self) -> None:
        if self._weights != self.compressed.weights_state():
            raise InputError("the model's weights have changed since this context was read: read the text again.")


def _made_by(compressed: CompressedModel) -> dict[str, Any]:
    return {**compressed.identity, "dtype": str(compressed.backbone.dtype).removeprefix("torch.")}


def _one_row(ids: Tensor) -> Int[Tensor, "1 tokens"]:
    """Ids of one text, with or without a dimension of rows."""
    if ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        raise InputError(f"ids have shape {tuple(ids.shape)}; a context holds one text: (tokens,) or (1, tokens).")
    return ids.reshape(1, -1)


def read_manifest(path: str | Path) -> Mapping[str, Any]:
    """What a context's file says of itself; raises `CheckpointError`."""
    return read_saved_manifest(Path(path), KIND)

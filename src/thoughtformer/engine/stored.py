"""One model's part of a sentence store: follows the model's weights, and turns vectors into bytes and back."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.errors import OutputError, StoreError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.fingerprint import encoder_fingerprint, encoder_weights

if TYPE_CHECKING:
    from thoughtformer.engine.store import SentenceStore

__all__ = ["StoredSentences"]

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16


class StoredSentences:
    """One model's sentences in a store: a `SentenceSource`.

    Follows the model: when its weights or their dtype change, so does the fingerprint, and what was kept before is not
    found any more. Counts `hits` and `misses`, in sentences, and the different ones `added`.
    """

    def __init__(self, store: SentenceStore, model: GPTHFForCausalLM, *, is_strict: bool = True) -> None:
        self.store = store
        self.model = model
        self.is_strict = is_strict
        self.shape = model.model.sentence_vector_shape
        self.hits = 0
        self.misses = 0
        self.added = 0
        self.failures = 0
        self._made_by: list[tuple[int, int, torch.dtype, torch.device]] | None = None
        self._some_values: list[Tensor] = []
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """Of what makes the vectors, now."""
        self._follow()
        return self._fingerprint

    def find(self, sentences: Sequence[bytes]) -> tuple[list[int], Float[Tensor, "found depths summaries hidden"]]:
        """See `SentenceSource`."""
        self._follow()
        digests = [_digest(sentence) for sentence in sentences]
        vectors: dict[bytes, bytes] = {}
        with self._tolerant():
            vectors = self.store._find(self._fingerprint, list(dict.fromkeys(digests)))
        found = [number for number, digest in enumerate(digests) if digest in vectors]
        self.hits += len(found)
        self.misses += len(digests) - len(found)
        joined = bytearray(b"".join(vectors[digests[number]] for number in found))
        if not found:
            return [], torch.zeros(0, *self.shape, dtype=self.model.dtype)
        return found, torch.frombuffer(joined, dtype=self.model.dtype).view(len(found), *self.shape)

    def add(self, sentences: Sequence[bytes], vectors: Float[Tensor, "sentences depths summaries hidden"]) -> None:
        """See `SentenceSource`."""
        self._follow()
        flat = vectors.detach().to("cpu", self.model.dtype).reshape(len(sentences), -1).contiguous().view(torch.uint8)
        kept = {_digest(sentence): row.tobytes() for sentence, row in zip(sentences, flat.numpy(), strict=True)}
        with self._tolerant():
            self.store._add(self._fingerprint, str(self.model.dtype), self.shape, kept)
            self.added += len(kept)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except (OutputError, StoreError) as error:
            if self.is_strict:
                raise
            self.failures += 1
            logger.warning("sentences are read anew: %s", error)

    def _follow(self) -> None:
        """Looks whether the weights are those that the fingerprint was taken of."""
        weights = [weight for _, weight in encoder_weights(self.model)]
        made_by = [
            (weight.data_ptr(), -1 if weight.is_inference() else weight._version, weight.dtype, weight.device)
            for weight in weights
        ]
        # Versions don't tell of what is written through `.data`, as adapters are merged; values from all over do.
        values = [_some_values(weight) for weight in weights]
        if made_by != self._made_by or not all(map(torch.equal, values, self._some_values)):
            self._fingerprint = encoder_fingerprint(self.model)
            self._made_by, self._some_values = made_by, [value.clone() for value in values]


def _some_values(weight: Tensor) -> Tensor:
    """At most some hundreds of a weight's values, from all over it."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, len(flat) // 257)]


def _digest(sentence: bytes) -> bytes:
    return hashlib.blake2b(sentence, digest_size=DIGEST_BYTES).digest()

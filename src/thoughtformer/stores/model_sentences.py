"""One model's part of a sentence store: follows the model's weights, and turns vectors into bytes and back."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.errors import OutputError, StoreError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.fingerprint import Followed, encoder_fingerprint, encoder_weights
from thoughtformer.stores.vectors import VectorStore

__all__ = ["StoredSentences"]

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16


class StoredSentences:
    """One model's sentences in a store: a `SentenceSource`.

    Follows the model: when its weights or their dtype change, so does the fingerprint, and what was kept before is not
    found any more. Counts `hits` and `misses`, in sentences, and the different ones `added`.
    """

    def __init__(self, store: VectorStore, model: GPTHFForCausalLM, *, is_strict: bool = True) -> None:
        self.store = store
        self.model = model
        self.is_strict = is_strict
        self.shape = model.model.sentence_vector_shape
        self.hits = 0
        self.misses = 0
        self.added = 0
        self.failures = 0
        self._follow = Followed(
            lambda: encoder_fingerprint(model), lambda: (weight for _, weight in encoder_weights(model))
        )

    @property
    def fingerprint(self) -> str:
        """Of what makes the vectors, now."""
        return self._follow()

    def find(self, sentences: Sequence[bytes]) -> tuple[list[int], Float[Tensor, "found depths summaries hidden"]]:
        """See `SentenceSource`."""
        fingerprint = self._follow()
        digests = [_digest(sentence) for sentence in sentences]
        vectors: dict[bytes, bytes] = {}
        with self._tolerant():
            vectors = self.store._find(fingerprint, list(dict.fromkeys(digests)))
        size = math.prod(self.shape) * self.model.dtype.itemsize
        vectors = {digest: vector for digest, vector in vectors.items() if len(vector) == size}
        found = [number for number, digest in enumerate(digests) if digest in vectors]
        self.hits += len(found)
        self.misses += len(digests) - len(found)
        joined = bytearray(b"".join(vectors[digests[number]] for number in found))
        if not found:
            return [], torch.zeros(0, *self.shape, dtype=self.model.dtype)
        return found, torch.frombuffer(joined, dtype=self.model.dtype).view(len(found), *self.shape)

    def add(self, sentences: Sequence[bytes], vectors: Float[Tensor, "sentences depths summaries hidden"]) -> None:
        """See `SentenceSource`."""
        fingerprint = self._follow()
        flat = vectors.detach().to("cpu", self.model.dtype).reshape(len(sentences), -1).contiguous().view(torch.uint8)
        kept = {_digest(sentence): row.tobytes() for sentence, row in zip(sentences, flat.numpy(), strict=True)}
        with self._tolerant():
            self.store._add(fingerprint, str(self.model.dtype), self.shape, kept)
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


def _digest(sentence: bytes) -> bytes:
    return hashlib.blake2b(sentence, digest_size=DIGEST_BYTES).digest()

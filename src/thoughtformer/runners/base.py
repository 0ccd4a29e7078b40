"""A model as the loop sees it: how text becomes ids and where it ends, what is read, and what is held of it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.rows import RowsCache
from thoughtformer.models.fingerprint import base_weights, weights_state
from thoughtformer.stores.model_sentences import StoredSentences

__all__ = ["ContextFollower", "Runner", "RequestContext", "end_ids_of", "identity_of"]

#: Characters of a text that is read whole at once, whatever the limit.
SHORT_TEXT = 1 << 14
#: Tokens by which the beginning of a text may differ from the text's own beginning, where it is cut.
CUT_TOKENS = 64


def identity_of(weights: str, described: Any, dtype: torch.dtype) -> str:
    """A short name for weights, by their fingerprint, and for how they are used."""
    digest = hashlib.blake2b(json.dumps(described, default=str, sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{weights}-{digest} {str(dtype).removeprefix('torch.')}"


def end_ids_of(model: Any, tokenizer: Any, *, vocab_size: int, also: Iterable[int] = ()) -> tuple[int, ...]:
    """All ids that end a text: those that the tokenizer, the configuration and the generation configuration name.

    Many models name only some of them in each place: the end of a turn in one, the end of a document in another. Ids
    that the model hasn't, with which some configurations say "none", are left out.
    """
    named: list[Any] = [
        getattr(tokenizer, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(model.generation_config, "eos_token_id", None),
    ]
    ends = {*also}
    for ids in named:
        ids = ids.flatten().tolist() if isinstance(ids, Tensor) else ids
        ends |= {int(token) for token in (ids if isinstance(ids, list | tuple) else [ids]) if token is not None}
    return tuple(sorted(token for token in ends if 0 <= token < vocab_size))


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """A row's context as the model holds it.

    Attributes:
        closed_sentences: that were folded, or would be if the model folded; of a compressed model, spans folded.
        open_tokens: of the open sentence; of a compressed model, tokens held as they are.
        held_bytes: what the row alone would hold now.
        plain_bytes: what a plain GPT of as many layers would, for the same text without sentence ends.
        folded: the text of a span that the last token made a compressed model fold.
        rest: the text behind it.
    """

    closed_sentences: int
    open_tokens: int
    held_bytes: int
    plain_bytes: int
    folded: str | None = None
    rest: str | None = None


class ContextFollower(ABC):
    """Tells of one request's context after each of its new tokens, in time that doesn't grow with the text."""

    @abstractmethod
    def after(self, ids: Sequence[int], cache: RowsCache, index: int) -> RequestContext:
        """What `cache` holds of the request, its row number `index`, now that its ids are `ids`."""


class Runner(ABC):
    """One model and its tokenizer.

    Attributes:
        vocab_size: ids are below.
        max_tokens: a row's, prompt and new ones; None: no limit.
        end_ids: any of them ends a text: what tokenizer, configuration and generation configuration name, together.
        start_ids: any of them starts a document; none where documents can't be told by their ids.
        sentence_end: closes a sentence; None: nothing does.
        exempt_ids: from the repetition penalty.
        sentences: known from before.
        can_join: caches of several rows can be one.
        can_speculate: what was read can be taken back.
        can_save: a file can say how what is held goes on.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    vocab_size: int
    end_ids: tuple[int, ...]
    start_ids: tuple[int, ...] = ()
    exempt_ids: tuple[int, ...]
    sentence_end: int | None = None
    sentences: StoredSentences | None = None
    can_join: bool = True
    can_speculate: bool = True
    can_save: bool = True

    @property
    @abstractmethod
    def max_tokens(self) -> int | None: ...

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """A text's ids; it may go on. With `start`, as a text of its own."""
        return self.tokenizer.encode_document(text, complete=False, start=start).tolist()

    def has_more_tokens(self, text: str, limit: int) -> bool:
        """Whether a text surely comes to more than so many tokens, in the time that it takes to read about so many.

        A text that is much too long is so refused without being read whole.
        """
        length = max(4 * limit, SHORT_TEXT)
        while length < len(text):
            if len(self.encode(text[:length], start=False)) > limit + CUT_TOKENS:
                return True
            length *= 2
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(list(ids))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids by what the tokens are called, of those that text leaves out."""
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special and token.content}

    def check(self, ids: Sequence[int], number: int) -> None:
        """Raises `InputError` for ids that this model can't read; `number` is the prompt's."""
        return

    def prepare(self) -> None:
        """Called before every prefill, because the weights may have changed since the last."""
        return

    @abstractmethod
    def read(
        self, ids: Sequence[Sequence[int]], most_tokens: int
    ) -> tuple[Float[Tensor, "rows vocab"], RowsCache, list[int]]:
        """Reads prompts from their starts, without padding.

        Returns the logits after each, what is held, and how many tokens of each needn't be read. Rows may come to
        `most_tokens`.
        """

    @abstractmethod
    def read_on(
        self, ids: Sequence[int], cache: RowsCache | None, most_tokens: int
    ) -> tuple[Float[Tensor, "1 vocab"], RowsCache, int]:
        """Reads a piece of one row, after what `cache` holds; returns as `read` does."""

    @abstractmethod
    def step(self, ids: Sequence[int], cache: RowsCache) -> Float[Tensor, "rows vocab"]:
        """One more token of every row."""

    def verify(self, ids: Sequence[Sequence[int]], cache: RowsCache) -> Float[Tensor, "tokens vocab"]:
        """New tokens of every row, one or more: logits after each of them, row by row.

        Where every row has one, it is `step`. Else the cache's `autocommit` should be off, so that what turns out to be
        wrong can be taken back.
        """
        if all(len(new) == 1 for new in ids):
            return self.step([new[0] for new in ids], cache)
        return self._verify(ids, cache)

    @abstractmethod
    def _verify(self, ids: Sequence[Sequence[int]], cache: RowsCache) -> Float[Tensor, "tokens vocab"]: ...

    @abstractmethod
    def most_entries(self, prompt: Sequence[int], num_new_tokens: int) -> dict[str, int]:
        """The most entries that a row holds between steps, by kind; for `most_bytes`."""

    @abstractmethod
    def most_bytes(self, most_entries: Sequence[dict[str, int]], most_tokens: int) -> int:
        """What `num_bytes()` of rows that hold so much comes to at most."""

    @abstractmethod
    def check_history(self, cache: RowsCache, ids: Sequence[int]) -> None:
        """Raises `ValueError` unless a cache of one row can have come of these ids."""

    @abstractmethod
    def new_follower(self) -> ContextFollower:
        """Of a request's context, from its first new token on."""

    @abstractmethod
    def parts(self, ids: Sequence[int]) -> tuple[str, list[str], str]:
        """A prompt's text as it is held once read: what is kept of its start, what was folded, and the rest."""

    @abstractmethod
    def identity(self) -> str:
        """Of all that decides what is held: what one model wrote no other may read."""

    def weights_state(self) -> bytes | None:
        """Of the weights, as they are now: what is held was computed with them. None where they can't be read here."""
        return weights_state(weight for _, weight in base_weights(self.model))

    def new_cache(self, num_rows: int) -> RowsCache:
        """An empty cache."""
        return self.model.new_cache(num_rows)

    def piece(self, ids: Sequence[int], most: int | None) -> int:
        """How many of a prompt's unread ids to read now, at most `most` where that is known."""
        return len(ids) if most is None else min(len(ids), most)

"""Models as the engine sees them: how text becomes ids and where it ends, what is read, and what is held of it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache import GPTHFCache
from thoughtformer.cache.rows import RowsCache
from thoughtformer.compression import CompressedModel
from thoughtformer.engine.rows import Row, RowContext
from thoughtformer.engine.stored import StoredSentences
from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
from thoughtformer.models.fingerprint import Followed, base_weights, exact_fingerprint, weights_state
from thoughtformer.models.gpthf.modeling import compile_steps
from thoughtformer.models.packed_linear import pack_weights, unpack_weights, using_packed_weights
from thoughtformer.text import SentenceTokenizer

__all__ = ["GPTHFReader", "Reader", "end_ids_of", "identity_of", "reader_of"]

#: Keys of the configuration that change nothing in what is held.
UNNAMED = ("allow_extrapolation", "initializer_range", "use_cache", "model_type", "keys_to_ignore_at_inference")
#: Keys that came later: left out while they are None, so that a name stays what it was.
LATER = ("body_visibility_settings",)


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


#: Characters of a text that is read whole at once, whatever the limit.
SHORT_TEXT = 1 << 14
#: Tokens by which the beginning of a text may differ from the text's own beginning, where it is cut.
CUT_TOKENS = 64


class Reader(ABC):
    """One model and its tokenizer.

    Attributes:
        vocab_size: ids are below.
        max_tokens: a row's, prompt and new ones; None: no limit.
        end_ids: any of them ends a text: what tokenizer, configuration and generation configuration name, together.
        start_ids: any of them starts a document; none where documents can't be told by their ids.
        sentence_end: closes a sentence; None: nothing does.
        exempt_ids: from the repetition penalty.
        sentences: known from before.
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
    def context_of(self, row: Row, cache: RowsCache, index: int) -> RowContext:
        """What `cache` holds of a row, its row number `index`."""

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


class GPTHFReader(Reader):
    """A GPTHF, or its plain GPT.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        sentences, pack, compile: see `Engine`.
    """

    def __init__(
        self,
        model: GPTHFForCausalLM,
        tokenizer: SentenceTokenizer,
        *,
        sentences: StoredSentences | None = None,
        pack: bool = True,
        compile: bool = False,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sentences = sentences
        self.pack = pack
        self.compile = compile
        self._fingerprint = Followed(
            lambda: exact_fingerprint(model), lambda: (weight for _, weight in base_weights(model))
        )
        config = model.config
        self.vocab_size = config.vocab_size
        self.sentence_end = config.sentence_end_token_id
        self.start_ids = () if config.bos_token_id is None else (config.bos_token_id,)
        self.end_ids = end_ids_of(model, tokenizer, vocab_size=self.vocab_size, also=self.start_ids)
        # As `model.generate` has it.
        self.exempt_ids = self.start_ids if self.sentence_end is None else (self.sentence_end, *self.start_ids)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.model.device

    @property
    def max_tokens(self) -> int | None:
        config = self.model.config
        return None if config.allow_extrapolation else config.max_position_embeddings

    def prepare(self) -> None:
        if self.pack:
            pack_weights(self.model)
        else:
            unpack_weights(self.model)
        compile_steps(self.model, enabled=self.compile)

    def read(
        self, ids: Sequence[Sequence[int]], most_tokens: int
    ) -> tuple[Float[Tensor, "rows vocab"], RowsCache, list[int]]:
        cache = self.model.new_cache(len(ids))
        cache.reserve(most_tokens)
        logits, known = self._read(ids, cache)
        return logits, cache, known

    def read_on(
        self, ids: Sequence[int], cache: RowsCache | None, most_tokens: int
    ) -> tuple[Float[Tensor, "1 vocab"], RowsCache, int]:
        held: RowsCache = self.model.new_cache(1) if cache is None else cache
        held.reserve(most_tokens)
        logits, known = self._read([ids], held)
        return logits, held, known[0]

    def _read(self, ids: Sequence[Sequence[int]], cache: RowsCache) -> tuple[Float[Tensor, "rows vocab"], list[int]]:
        lengths = torch.tensor([len(row) for row in ids])
        wanted = torch.zeros(int(lengths.sum()), dtype=torch.bool)
        wanted[lengths.cumsum(0) - 1] = True
        assert isinstance(cache, GPTHFCache)
        with using_packed_weights():
            logits, output = self.model.ragged_logits(
                torch.tensor([token for row in ids for token in row], device=self.device),
                torch.arange(len(ids)).repeat_interleave(lengths),
                cache,
                wanted=wanted,
                sentence_source=self.sentences,
            )
        return logits, [0] * len(ids) if output.known_tokens is None else output.known_tokens.tolist()

    def step(self, ids: Sequence[int], cache: RowsCache) -> Float[Tensor, "rows vocab"]:
        assert isinstance(cache, GPTHFCache)
        new = torch.tensor(ids, device=self.device)
        with using_packed_weights():
            return self.model.ragged_logits(new, torch.arange(len(ids)), cache, num_columns=1)[0]

    def most_entries(self, prompt: Sequence[int], num_new_tokens: int) -> dict[str, int]:
        return self.model.model.most_entries(prompt, num_new_tokens)

    def most_bytes(self, most_entries: Sequence[dict[str, int]], most_tokens: int) -> int:
        longest = {stage: max(row[stage] for row in most_entries) for stage in most_entries[0]}
        return self.model.model.cache_bytes(longest, len(most_entries), reserve_tokens=most_tokens)

    def check_history(self, cache: RowsCache, ids: Sequence[int]) -> None:
        assert isinstance(cache, GPTHFCache)
        self.model.model.check_history(cache, ids)

    def context_of(self, row: Row, cache: RowsCache, index: int) -> RowContext:
        assert isinstance(cache, GPTHFCache)
        entries = {stage.name: int(stage.lengths[index]) for stage in cache.stages}
        num_sentences, num_starts, last = row.count_ends(self.sentence_end, self.start_ids)
        config = self.model.config
        shape = config.layer_shape("decoder")
        entry = 2 * config.num_hidden_layers * shape.num_kv_heads * shape.head_dim * self.model.dtype.itemsize
        return RowContext(
            closed_sentences=num_sentences,
            open_tokens=len(row.ids) - (last + 1),
            held_bytes=self.model.model.cache_bytes(entries, 1),
            plain_bytes=entry * (len(row.ids) - num_sentences - num_starts),
        )

    def parts(self, ids: Sequence[int]) -> tuple[str, list[str], str]:
        closed, start = [], 0
        for place, token in enumerate(ids):
            if token == self.sentence_end:
                closed.append(self.decode(ids[start:place]))
                start = place + 1
        return "", closed, self.decode(ids[start:])

    def identity(self) -> str:
        config = self.model.config
        shape = {name: getattr(config, name) for name in sorted(GPTHFConfig.__annotations__) if name not in UNNAMED}
        shape = {name: value for name, value in shape.items() if name not in LATER or value is not None}
        return identity_of(self._fingerprint(), shape, self.model.dtype)

    def piece(self, ids: Sequence[int], most: int | None) -> int:
        size, end = super().piece(ids, most), self.sentence_end
        if size < len(ids) and self.sentences is not None and end is not None and end in ids[:size]:
            return size - list(ids[:size])[::-1].index(end)  # whole sentences, so that they can be known
        return size


def reader_of(
    model: GPTHFForCausalLM | CompressedModel,
    tokenizer: Any,
    *,
    sentences: StoredSentences | None = None,
    pack: bool = True,
    compile: bool = False,
) -> Reader:
    """The model's reader; arguments as for `Engine`.

    Raises:
        InputError: no model, but its name, say.
        UnsupportedError: something that this kind of model can't do.
    """
    if not isinstance(model, (torch.nn.Module, CompressedModel)):
        raise InputError(f"model is {model!r}: load it first: model, tokenizer = thoughtformer.load(name).")
    if isinstance(model, GPTHFForCausalLM):
        return GPTHFReader(model, tokenizer, sentences=sentences, pack=pack, compile=compile)
    from thoughtformer.engine.compressed import CompressedReader

    if not isinstance(model, CompressedModel):
        raise UnsupportedError(
            f"a {type(model).__name__} is read as it is by thoughtformer.compress(model, 'full'): give that."
        )
    if sentences is not None:
        raise UnsupportedError("a compressed model has no vectors of sentences: leave the store out.")
    if compile:
        raise UnsupportedError("steps of a compressed model can't be compiled: what they read changes its shape.")
    return CompressedReader(model, tokenizer)

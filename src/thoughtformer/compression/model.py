"""A causal LM that reads through a compression method; `generate` stays transformers' own.

Over 500 lines: the checks of `forward` are one contract with transformers, and stand beside what they guard. What
layers hold, and how they attend, is in `holding.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from itertools import count, pairwise
from types import TracebackType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from thoughtformer.cache.compressed import CompressedCache
from thoughtformer.cache.entries import Store
from thoughtformer.cache.groups import LayerGroup
from thoughtformer.checks import check_count
from thoughtformer.compression.adapter import SentinelAdapter
from thoughtformer.compression.at_once import EXECUTIONS
from thoughtformer.compression.holding import Holding, shape_of
from thoughtformer.compression.method import CacheBytes, Method, read_ids
from thoughtformer.compression.registry import settings_of
from thoughtformer.compression.view import GeneratingView
from thoughtformer.errors import ConfigError, ContextOverflowError, InputError, UnsupportedError, nearest
from thoughtformer.models.backbone import Attend, Backbone, backbone_of
from thoughtformer.models.fingerprint import (
    Followed,
    base_weights,
    exact_fingerprint,
    fingerprint,
    tensors_fingerprint,
    weights_state,
)
from thoughtformer.models.padding import KeptColumns, check_ids, check_positions, real_tokens
from thoughtformer.models.transformers_api import CACHE_NAME, CachedOutput, one_cache, refuse_arguments, runs_uncompiled
from thoughtformer.rules.schedule import Chunk, RowProgress, RowReading, lay_out

__all__ = ["CompressedModel"]


class CompressedModel(GeneratingView):
    """Reads and writes with `model`, of whose context `method` keeps a part.

    A context manager: leaving it takes the adapter out of the model, which is then just what it was. The model itself,
    and other views of it, can be used meanwhile, in other threads as well: what this one reads by, and whether its
    adapter acts, comes with each call.

    Args:
        model: a causal LM of a supported architecture.
        method: what is dropped or folded, and when.
        adapter: the sentinels of a `Sentinel` method; made or loaded for this very model.
        execution: how texts are read at once: `gathered`, `dense` or `flex`; all give the same.
        prefill_tokens: tokens read at once when a cache is kept; bounds the memory of a long prompt.
        allow_extrapolation: take texts longer than the model was trained for.

    Raises:
        UnsupportedError: an architecture, attention backend, or combination that can't be exact.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        adapter: SentinelAdapter | None = None,
        *,
        backbone: Backbone | None = None,
        execution: str = "gathered",
        prefill_tokens: int = 512,
        allow_extrapolation: bool = False,
    ) -> None:
        super().__init__(model)
        self.backbone = backbone_of(model) if backbone is None else backbone
        try:
            self._configure(method, adapter, execution, prefill_tokens, allow_extrapolation)
        except BaseException:
            self.backbone.close()
            raise
        self._exact_fingerprint = Followed(
            lambda: exact_fingerprint(model), lambda: (weight for _, weight in base_weights(model))
        )
        self._adapter_fingerprint = Followed(
            lambda: tensors_fingerprint(_numbered(self.adapter), lambda values: values),
            lambda: [] if self.adapter is None else self.adapter.trainable(),
        )
        self._is_closed = False
        self.train(model.training)

    def _configure(
        self,
        method: Method,
        adapter: SentinelAdapter | None,
        execution: str,
        prefill_tokens: int,
        allow_extrapolation: bool,
    ) -> None:
        if execution not in EXECUTIONS:
            raise ConfigError(f"execution={execution!r}.{nearest(execution, EXECUTIONS)}")
        if execution == "flex" and self.backbone.shapes_scores is not None:
            raise UnsupportedError(
                f"{type(self.model).__name__} {self.backbone.shapes_scores}, which FlexAttention here doesn't: leave "
                "execution out."
            )
        check_count("prefill_tokens", prefill_tokens, 1)
        if method.needs_adapter and adapter is None:
            raise ConfigError(f"the method {method.name!r} needs an adapter: name one, or train it first.")
        if adapter is not None and not method.needs_adapter:
            raise ConfigError(f"the method {method.name!r} takes no adapter.")
        if method.needs_tokenizer:
            raise ConfigError(
                f"{method.name} goes by token ids that only a tokenizer tells: give compress a tokenizer."
            )
        method.check(self.backbone)
        if self.backbone.shapes_scores is not None and execution == "gathered":
            execution = "dense"  # by the model's own attention, which alone knows how
        method = method.bound(shape_of(self.backbone))
        if allow_extrapolation and self.backbone.rotation is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} has learned positions, none beyond {self.backbone.max_tokens}: it can't "
                "read longer texts. Leave allow_extrapolation out."
            )
        self.adapter = adapter
        self.method = method
        self.holding = Holding(self.backbone, method)
        self.execution = execution
        self.prefill_tokens = prefill_tokens
        self.allow_extrapolation = allow_extrapolation or bool(getattr(self.config, "allow_extrapolation", False))
        self._settings = settings_of(method)

    @property
    def groups(self) -> list[LayerGroup]:
        """Layers that attend alike; those first that the method acts on."""
        return self.holding.groups

    # The life of the wrapper.

    def __enter__(self) -> CompressedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the adapter out of the model, and gives its attention back."""
        if self.adapter is not None:
            self.adapter.remove()
        self.backbone.close()
        self._is_closed = True

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the model underneath, as its own `save_pretrained`.

        Raises:
            UnsupportedError: an adapter's LoRA is in it.
        """
        if self.adapter is not None:
            raise UnsupportedError(
                "the model underneath holds this view's adapter: close() the view first to save the model, or save the "
                "adapter alone by adapter.save(folder, fingerprint=compressed.base_fingerprint)."
            )
        self.model.save_pretrained(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where texts are read: the model's, or that of its first layer while hooks move weights about."""
        return self.backbone.device

    # Caches.

    @property
    def base_fingerprint(self) -> str:
        """The name of the base model's weights in any precision, by which adapters know it.

        Raises:
            UnsupportedError: weights that can't be read, because they are elsewhere.
        """
        return fingerprint(self.model)

    @property
    def identity(self) -> dict[str, Any]:
        """What a saved cache belongs to: the weights, the adapter's sentinels, and what their entries are."""
        adapter = None if self.adapter is None else self._adapter_fingerprint()
        return self.cache_identity | {"model": self._exact_fingerprint(), "adapter": adapter}

    def weights_state(self) -> bytes | None:
        """Of the model's and the adapter's weights, as they are now; None where they can't be read here."""
        adapter = [] if self.adapter is None else self.adapter.trainable()
        return weights_state([*(weight for _, weight in base_weights(self.model)), *adapter])

    @property
    def cache_identity(self) -> dict[str, Any]:
        """What a cache in memory belongs to: the same, by model and adapter themselves instead of their weights."""
        return {
            "model": f"{type(self.model).__name__} number {_number(self.model)}",
            "adapter": self._adapter_name(),
            "method": self.method.name,
            "settings": self._settings,
            "kind": self.method.kind,
        } | ({"windows": self.backbone.windows} if len(self.groups) > 1 else {})

    def _adapter_name(self) -> str | None:
        """Which adapter it is, and how often it was trained or written to."""
        if self.adapter is None:
            return None
        version = sum(0 if part.is_inference() else part._version for part in self.adapter.trainable())
        return f"number {_number(self.adapter)}, version {version}"

    def new_cache(self, num_rows: int) -> CompressedCache:
        """An empty cache for `num_rows` rows, in the model's dtype and on its device."""
        return CompressedCache(
            self.holding.new_store(num_rows), [RowProgress() for _ in range(num_rows)], self.cache_identity
        )

    def check_history(self, cache: CompressedCache, ids: Sequence[int]) -> None:
        """Raises `ValueError` unless a cache of one row is that of these ids, as far as its schedule tells."""
        expected = RowProgress()
        read_ids(self.method, expected, list(ids))
        (found,) = cache.rows
        if found != expected:
            raise ValueError(f"its row is at {found}, but its ids come to {expected}")
        cached = tuple(int(lengths[0]) for lengths in cache.store.lengths_by_part())
        if cached != self.num_stored(expected):
            raise ValueError(f"it holds {cached} entries, but its ids leave {self.num_stored(expected)}")
        cache.store.check_positions(0, len(ids))

    def num_stored(self, row: RowProgress) -> tuple[int, ...]:
        """Entries that a cache holds of a row, in each part that is sized by itself."""
        return self.holding.num_stored(row)

    def cache_bytes(
        self,
        longest_row_entries: Sequence[int],
        num_rows: int,
        *,
        dtype: torch.dtype | None = None,
        kind: CacheBytes = "stored",
    ) -> int:
        """What `num_bytes()` of a cache must be, block rounding included.

        Args:
            longest_row_entries: the most that any row holds, in each part that is sized by itself.
            num_rows: rows.
            dtype: of keys and values; None: the model's.
            kind: all that is stored, or what of it is in memory, or what a step reads of it.
        """
        return self.holding.num_bytes(longest_row_entries, num_rows, dtype, kind)

    # Reading.

    @runs_uncompiled
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | None = None,
        cache: CompressedCache | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: CompressedCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CachedOutput | tuple[Any, ...]:
        """Logits of new tokens, each as if the text up to it had been read token by token.

        Args:
            input_ids: new tokens; padding at either side.
            attention_mask: 1 for tokens, 0 for padding, over the new columns or all columns seen.
            cache: from `new_cache` or an earlier forward pass; updated.
            labels: ids to score, -100 for none; needs all logits.
            use_cache: keep what later tokens need; default: outside of training, if no labels are given.
            logits_to_keep: the last so many columns, or these columns. Padding has the logits of the token before it,
                or 0 where there is none.
            return_dict: False for a tuple.
            past_key_values: `cache`, by the name that it had up to transformers 5.23.
            num_items_in_batch: of the whole step, whose sum of losses is divided by it; default: this batch's mean.
            kwargs: `position_ids`, which are checked to be what the method counts itself; else nothing but what
                transformers hands to every model, as long as it is off.

        Raises:
            ContextOverflowError: a row grows past the trained length.
            ArgumentError, InputError, UnsupportedError: arguments that aren't known, or can't be honoured.
        """
        # Not named in the signature: `generate` would then make some, and miscount in rows padded at the right.
        position_ids = kwargs.pop("position_ids", None)
        refuse_arguments(kwargs, of=self, known=_ARGUMENTS)
        if input_ids is None or input_ids.dim() != 2:
            raise InputError("input_ids of shape (batch, seq) are needed: a method decides on token ids.")
        batch = input_ids.shape[0]
        real = real_tokens(input_ids, attention_mask)
        keep = KeptColumns(logits_to_keep, real)
        if labels is not None and not keep.is_all:
            raise InputError("labels need all logits: leave logits_to_keep at 0.")
        if use_cache is None:
            use_cache = not self.training and labels is None
        cached = one_cache(cache, past_key_values)
        if cached is None and use_cache:
            cached = self.new_cache(batch)
        if cached is not None:
            self._check_cache(cached, batch)
        if self.training and labels is not None and torch.is_grad_enabled() and not self.method.can_train:
            raise UnsupportedError(
                f"{self.method.name!r} can't be trained through: it overwrites what it drops. Train with another "
                "method; to score, call eval() or use torch.no_grad()."
            )
        before = torch.zeros(batch, dtype=torch.long) if cached is None else cached.num_tokens
        check_positions(position_ids, real, before)
        hidden = self.read(input_ids, real, cached, wanted=keep.wanted)
        logits = keep.laid_out(self.backbone.logits(hidden))
        loss = None
        if labels is not None:
            predicted = real.clone()
            predicted[:, 1:] &= real[:, :-1]
            labels = labels.masked_fill(~predicted.to(labels.device), -100)
            loss = self.model.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        output = CachedOutput(loss=loss, logits=logits, **cast(dict[str, Any], {CACHE_NAME: cached}))
        return output if return_dict is not False else output.to_tuple()

    def read(
        self,
        input_ids: Int[Tensor, "batch seq"],
        real: Tensor,
        cache: CompressedCache | None,
        *,
        wanted: Tensor | None = None,
    ) -> Float[Tensor, "wanted hidden"]:
        """The final hidden states of the wanted tokens (all by default), row by row; `cache` is updated.

        With a cache, at most `prefill_tokens` columns are computed at once. A pass that fails leaves the cache as it
        was; an H2O cache is emptied, because it has overwritten what it dropped.
        """
        if self._is_closed:
            raise InputError(
                "this compressed model was closed: its adapter is gone. Call thoughtformer.compress again."
            )
        wanted = real if wanted is None else wanted
        batch = input_ids.shape[0]
        rows = [RowProgress() for _ in range(batch)] if cache is None else [row.copy() for row in cache.rows]
        ids = [row_ids[row_real].tolist() for row_ids, row_real in zip(input_ids.cpu(), real, strict=True)]
        longest = max((row.num_tokens + len(new) for row, new in zip(rows, ids, strict=True)), default=0)
        self.check_length(longest, "the text comes to")
        check_ids(ids, self.backbone.vocab_size)  # those behind are sentinels, which only a method sets
        self._check_documents(ids, rows)
        # What may be read again, up to the last of the new tokens.
        texts = [[*row.window, *new] if self.method.can_reread else [] for row, new in zip(rows, ids, strict=True)]
        readings = [read_ids(self.method, row, new) for row, new in zip(rows, ids, strict=True)]
        needs_store = self.method.needs_store
        store = cache.store if cache is not None else self.holding.new_store(batch) if needs_store else None
        # What nothing happens to is read in one piece, as the model underneath would read it.
        has_events = any(reading.events for reading in readings) or needs_store
        width = max((len(new) for new in ids), default=0)
        step = self.prefill_tokens if cache is not None and has_events else max(width, 1)
        cuts = self._cuts(readings, width, step)
        backup = None if cache is None else cache.snapshot(whole=len(cuts) > 1)
        if cache is not None:
            cache.begin()
        parts: list[list[Tensor]] = [[] for _ in range(batch)]
        token_wanted = [row_wanted[row_real] for row_wanted, row_real in zip(wanted, real, strict=True)]
        try:
            for start, end in pairwise([0, *cuts]):
                pieces = [reading.piece(start, end) for reading in readings]
                hidden, chunk = self._compute(pieces, store, is_kept=cache is not None or end < width)
                if self.method.can_reread and store is not None and (cache is not None or end < width):
                    self._read_again(pieces, texts, rows, store)
                for row, part in enumerate(token_wanted):
                    part = part[start:end]
                    columns = chunk.token_column[row, : len(part)][part]
                    parts[row].append(hidden[row, columns.to(hidden.device)])
        except BaseException:
            if cache is not None:
                cache.restore(backup)
            raise
        if cache is not None:
            cache.record(rows, ids, input_ids.shape[1], partial(read_ids, self.method))
        flat = [part for row_parts in parts for part in row_parts]
        return torch.cat(flat) if flat else self.backbone.embed(input_ids[:, :0].to(self.device)).flatten(0, 1)

    def _cuts(self, readings: Sequence[RowReading], width: int, step: int) -> list[int]:
        """Columns at which a pass ends: every `step`, where something is read again, and at the end."""
        cuts = {*range(step, width, step), width} if width else set()
        if self.method.can_reread:
            for reading in readings:
                cuts |= {
                    column + 1
                    for column in range(len(reading.ids))
                    if self.method.rereads(reading.first_position + column + 1)
                }
        return sorted(cuts)

    def _read_again(
        self,
        pieces: Sequence[RowReading],
        texts: Sequence[Sequence[int]],
        rows: Sequence[RowProgress],
        store: Store,
    ) -> None:
        """Reads what the method wants read once more behind these pieces; `texts` end with each row's last token."""
        readings = []
        for piece, text, row in zip(pieces, texts, rows, strict=True):
            num_tokens = piece.first_position + len(piece.ids)
            positions = self.method.rereads(num_tokens) if piece.ids else None
            first = row.num_tokens - len(text)
            again = [] if positions is None else text[positions.start - first : positions.stop - first]
            readings.append(RowReading(again, num_tokens, []))
        if not any(reading.ids for reading in readings):
            return
        chunk = lay_out(readings, vocab_size=self.backbone.vocab_size, num_summaries=0)
        attend = self.holding.attend_again(chunk, store, execution=self.execution)
        self.run(chunk.input_ids, chunk.entries.position, attend)
        attend.finish()

    def _compute(self, readings: Sequence[RowReading], store: Store | None, *, is_kept: bool) -> tuple[Tensor, Chunk]:
        """Hidden states of one chunk's entries; `store`, if it is kept, holds afterwards what later tokens may read."""
        backbone, method = self.backbone, self.method
        chunk = lay_out(readings, vocab_size=backbone.vocab_size, num_summaries=method.num_sentinels_read)
        attend = self.holding.attend(chunk, store, execution=self.execution)
        hidden = self.run(chunk.input_ids, chunk.entries.position, attend)
        if is_kept:  # otherwise nothing that gradients need is overwritten
            attend.finish()
        return hidden, chunk

    def run(
        self, input_ids: Int[Tensor, "rows entries"], position: Int[Tensor, "rows entries"], attend: Attend
    ) -> Float[Tensor, "rows entries hidden"]:
        """The model's final hidden states of tokens and sentinels under some attention."""
        backbone = self.backbone
        input_ids, position_ids = input_ids.to(backbone.device), position.long().to(backbone.device)
        if self.adapter is None:
            return backbone.forward(backbone.embed(input_ids), position_ids, attend)
        if self.adapter.vocab_size != backbone.vocab_size:
            raise InputError(
                f"the adapter's sentinels come after a vocabulary of {self.adapter.vocab_size}, but the model has "
                f"{backbone.vocab_size} embeddings now: close this view, and resize before compress()."
            )
        on = self.adapter.acting_on(input_ids >= backbone.vocab_size)
        return backbone.forward(self.adapter.embed(backbone, input_ids), position_ids, attend, on)

    def check_generated_length(self, num_tokens: int, num_prompt_tokens: int) -> None:
        """Raises `ContextOverflowError` if prompt and new tokens come to more than the model was trained for."""
        self.check_length(num_tokens, "prompt and new tokens come to")

    def check_length(self, num_tokens: int, what: str) -> None:
        """Raises `ContextOverflowError` past the trained length; `what` names the text."""
        limit = self.backbone.text_limit
        if limit is not None and num_tokens > limit:
            raise ContextOverflowError(
                f"{what} {num_tokens} tokens, but layers of {type(self.model).__name__} that methods act on read a "
                f"window of {limit}: longer texts can't be compressed exactly. Leave out {num_tokens - limit} tokens."
            )
        limit = self.backbone.max_tokens
        if num_tokens > limit and not self.allow_extrapolation:
            raise ContextOverflowError(
                f"{what} {num_tokens} tokens, but the model was trained for {limit}. Compression shortens what is "
                "held, not the positions counted. "
                f"Leave out {num_tokens - limit} tokens, or set allow_extrapolation=True."
            )

    def _check_documents(self, ids: Sequence[Sequence[int]], rows: Sequence[RowProgress]) -> None:
        """This package's GPT starts a new document, unread by the last, at each start token; a method knows one."""
        start = self.config.bos_token_id if self.config.model_type == "gpthf" else None
        if start is None:
            return
        for new, row in zip(ids, rows, strict=True):
            if start in (new[1:] if row.num_tokens == 0 else new):
                raise InputError(
                    f"a row has the document start (id {start}) inside: compress one document a row. The base model "
                    "would not read across it."
                )

    def _check_cache(self, cache: Any, batch: int) -> None:
        if not isinstance(cache, CompressedCache):
            raise InputError(
                f"the cache given is a {type(cache).__name__}; a compressed model reads a CompressedCache: "
                "new_cache(rows)."
            )
        if cache.num_rows != batch:
            raise InputError(f"the cache given holds {cache.num_rows} rows, input_ids has {batch}.")
        mine = self.cache_identity
        differing = [name for name in mine if cache.identity.get(name) != mine[name]]
        if differing:
            raise InputError(
                "the cache given was written by another model: "
                + "; ".join(f"{name} was {cache.identity.get(name)!r}, is {mine[name]!r}" for name in differing)
                + "."
            )


#: What `forward` takes.
_ARGUMENTS = tuple(name for name in inspect.signature(CompressedModel.forward).parameters if name != "kwargs")


_NUMBERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_COUNTER = count(1)


def _number(model: nn.Module) -> int:
    """A model's number in this process; an address may be given again to another."""
    return _NUMBERS.setdefault(model, next(_COUNTER))


def _numbered(adapter: SentinelAdapter | None) -> list[tuple[str, Tensor]]:
    return [] if adapter is None else [(str(number), part) for number, part in enumerate(adapter.trainable())]

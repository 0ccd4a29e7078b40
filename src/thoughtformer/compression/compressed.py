"""A causal LM that reads through a compression method; `generate` stays transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from thoughtformer.attention.schedule import Chunk, RowProgress, RowReading, lay_out
from thoughtformer.cache.compressed import BLOCK_ENTRIES, ENTRY_FIELDS, CompressedCache, EntrySlots, Store
from thoughtformer.cache.slots import slots_bytes
from thoughtformer.checks import check_count
from thoughtformer.compression.adapter import SentinelAdapter
from thoughtformer.compression.attending import EXECUTIONS, AttendAtOnce, AttendHeld
from thoughtformer.compression.combiner import Combiner
from thoughtformer.compression.generating import GeneratingView
from thoughtformer.compression.heavy_hitters import AttendHeavyHitters, HeavyHitters, HeavyHitterStore
from thoughtformer.compression.method import Method, read_ids
from thoughtformer.compression.sentinel import Sentinel
from thoughtformer.compression.settings import settings_of
from thoughtformer.compression.streaming import StreamingLLM
from thoughtformer.errors import ConfigError, ContextOverflowError, InputError, UnsupportedError, nearest
from thoughtformer.models.backbone import Attend, Backbone, backbone_of
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.models.padding import KeptColumns, check_ids, check_positions, real_tokens

__all__ = ["CompressedModel"]


class CompressedModel(GeneratingView):
    """Reads and writes with `model`, of whose context `method` keeps a part.

    A context manager: leaving it takes the adapter out of the model, which is then just what it was. The model itself
    can be used meanwhile; a forward pass of this one changes nothing that it reads, but for the adapter's LoRA.

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
        base_fingerprint: str | None = None,
    ) -> None:
        super().__init__(model)
        self.backbone = backbone_of(model) if backbone is None else backbone
        if execution not in EXECUTIONS:
            raise ConfigError(f"execution={execution!r}.{nearest(execution, EXECUTIONS)}")
        check_count("prefill_tokens", prefill_tokens, 1)
        if method.needs_adapter and adapter is None:
            raise ConfigError(f"the method {method.name!r} needs an adapter: name one, or train it first.")
        if adapter is not None and not method.needs_adapter:
            raise ConfigError(f"the method {method.name!r} takes no adapter.")
        if isinstance(method, Sentinel | Combiner):
            policy = method.policy.bound(
                bytes_per_entry=self.backbone.kv_bytes_per_entry(), num_summaries=method.num_summaries
            )
            method = replace(method, policy=policy)
        if allow_extrapolation and self.backbone.rotation is None:
            raise UnsupportedError(
                f"{type(model).__name__} has learned positions, none beyond {self.backbone.max_tokens}: it can't read "
                "longer texts. Leave allow_extrapolation out."
            )
        self.adapter = adapter
        self.method = method
        self.execution = execution
        self.prefill_tokens = prefill_tokens
        self.allow_extrapolation = allow_extrapolation or bool(getattr(model.config, "allow_extrapolation", False))
        self._settings = settings_of(method)
        self.base_fingerprint = fingerprint(model) if base_fingerprint is None else base_fingerprint
        self._adapter_version: tuple[int, str] | None = None
        self._is_closed = False
        self.train(model.training)

    # The life of the wrapper.

    def __enter__(self) -> CompressedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the adapter out of the model."""
        if self.adapter is not None:
            self.adapter.remove()
        self._is_closed = True

    # Caches.

    @property
    def identity(self) -> dict[str, Any]:
        """What a cache belongs to: the weights, the adapter's sentinels, and what their entries are."""
        kind = "pooled" if self.method.is_pooled else "entries"
        if isinstance(self.method, HeavyHitters):
            kind = f"at most {self.method.max_entries} a head"
        return {
            "model": self.base_fingerprint,
            "adapter": self._adapter_name(),
            "method": self.method.name,
            "settings": self._settings,
            "kind": kind,
        }

    def _adapter_name(self) -> str | None:
        """The adapter's fingerprint, taken anew only when a parameter has changed."""
        if self.adapter is None:
            return None
        parameters = self.adapter.trainable()
        version = sum(0 if parameter.is_inference() else parameter._version for parameter in parameters)
        if self._adapter_version is None or self._adapter_version[0] != version:
            self._adapter_version = (version, fingerprint(_Parameters(parameters)))
        return self._adapter_version[1]

    def new_cache(self, num_rows: int) -> CompressedCache:
        """An empty cache for `num_rows` rows, in the model's dtype and on its device."""
        return CompressedCache(self._new_store(num_rows), [RowProgress() for _ in range(num_rows)], self.identity)

    def _new_store(self, num_rows: int) -> Store:
        backbone = self.backbone
        shape: dict[str, Any] = {
            "num_layers": backbone.num_layers,
            "num_rows": num_rows,
            "num_kv_heads": backbone.num_kv_heads,
            "head_dim": backbone.head_dim,
            "dtype": backbone.dtype,
            "device": backbone.device,
        }
        if isinstance(self.method, HeavyHitters):
            return HeavyHitterStore(self.method.max_entries, **shape)
        fields = (*ENTRY_FIELDS, "count") if self.method.is_pooled else ENTRY_FIELDS
        return EntrySlots(fields, block_entries=BLOCK_ENTRIES, **shape)

    def cache_bytes(self, longest_row_entries: int, num_rows: int) -> int:
        """What `num_bytes()` of a cache must be, whose longest row holds so many entries; block rounding included."""
        backbone = self.backbone
        if isinstance(self.method, HeavyHitters):
            slots = min(-(-max(longest_row_entries, 1) // BLOCK_ENTRIES) * BLOCK_ENTRIES, self.method.max_entries)
            exact = torch.promote_types(backbone.dtype, torch.float32).itemsize
            by_head = backbone.num_layers * num_rows * backbone.num_kv_heads * slots
            return by_head * (2 * backbone.head_dim * backbone.dtype.itemsize + exact + 4) + num_rows * 8
        return slots_bytes(
            len(ENTRY_FIELDS) + self.method.is_pooled,
            num_layers=backbone.num_layers,
            num_rows=num_rows,
            longest_row_entries=longest_row_entries,
            num_kv_heads=backbone.num_kv_heads,
            head_dim=backbone.head_dim,
            dtype=backbone.dtype,
            block_entries=BLOCK_ENTRIES,
        )

    # Reading.

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CompressedCache | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of new tokens, each as if the text up to it had been read token by token.

        Args:
            input_ids: new tokens; padding at either side.
            attention_mask: 1 for tokens, 0 for padding, over the new columns or all columns seen.
            past_key_values: from `new_cache` or an earlier forward pass; updated.
            labels: ids to score, -100 for none; needs all logits.
            use_cache: keep what later tokens need; default: outside of training, if no labels are given.
            logits_to_keep: the last so many columns, or these columns.
            position_ids: checked to be what the method counts itself.
            return_dict: False for a tuple.

        Raises:
            ContextOverflowError: a row grows past the trained length.
            InputError, UnsupportedError: arguments that can't be honoured.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states", "encoder_hidden_states"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise UnsupportedError(f"{name} is not available from a compressed model.")
        if input_ids is None or input_ids.dim() != 2:
            raise InputError("input_ids of shape (batch, seq) are needed: a method decides on token ids.")
        batch, seq = input_ids.shape
        real = real_tokens(input_ids, attention_mask)
        keep = KeptColumns(logits_to_keep, seq)
        if labels is not None and not keep.is_all:
            raise InputError("labels need all logits: leave logits_to_keep at 0.")
        if use_cache is None:
            use_cache = not self.training and labels is None
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache(batch)
        if past_key_values is not None:
            self._check_cache(past_key_values, batch)
        if self.training and labels is not None and torch.is_grad_enabled() and self.method.is_by_attention:
            raise UnsupportedError(
                f"{self.method.name!r} can't be trained through: it overwrites what it drops. Train with another "
                "method; to score, call eval() or use torch.no_grad()."
            )
        before = torch.zeros(batch, dtype=torch.long) if past_key_values is None else past_key_values.num_tokens
        check_positions(position_ids, real, before)
        hidden = self.read(input_ids, real, past_key_values, wanted=keep.wanted(real))
        logits = keep.laid_out(self.backbone.head()(hidden), real)
        loss = None
        if labels is not None:
            predicted = real.clone()
            predicted[:, 1:] &= real[:, :-1]
            labels = labels.masked_fill(~predicted.to(labels.device), -100)
            loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
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
        readings = [read_ids(self.method, row, new) for row, new in zip(rows, ids, strict=True)]
        needs_store = self.method.is_pooled or self.method.is_by_attention or isinstance(self.method, StreamingLLM)
        store = cache.store if cache is not None else self._new_store(batch) if needs_store else None
        # What nothing happens to is read in one piece, as the model underneath would read it.
        has_events = any(reading.events for reading in readings) or needs_store
        width = max((len(new) for new in ids), default=0)
        step = self.prefill_tokens if cache is not None and has_events else max(width, 1)
        backup = None if cache is None else cache.snapshot(whole=width > step)
        parts: list[list[Tensor]] = [[] for _ in range(batch)]
        token_wanted = [row_wanted[row_real] for row_wanted, row_real in zip(wanted, real, strict=True)]
        try:
            for start in range(0, width, step):
                pieces = [reading.piece(start, start + step) for reading in readings]
                hidden, chunk = self._compute(pieces, store, is_kept=cache is not None)
                for row, part in enumerate(token_wanted):
                    part = part[start : start + step]
                    columns = chunk.token_column[row, : len(part)][part]
                    parts[row].append(hidden[row, columns.to(hidden.device)])
        except BaseException:
            if cache is not None:
                cache.restore(backup)
            raise
        if cache is not None:
            cache.rows = rows
            cache.num_columns += input_ids.shape[1]
        flat = [part for row_parts in parts for part in row_parts]
        return torch.cat(flat) if flat else self.backbone.embed(input_ids[:, :0].to(self.device)).flatten(0, 1)

    def _compute(self, readings: Sequence[RowReading], store: Store | None, *, is_kept: bool) -> tuple[Tensor, Chunk]:
        """Hidden states of one chunk's entries; `store`, if it is kept, holds afterwards what later tokens may read."""
        backbone, method = self.backbone, self.method
        num_sentinels = 0 if method.is_pooled else method.num_summaries
        chunk = lay_out(readings, vocab_size=backbone.vocab_size, num_summaries=num_sentinels)
        attend: Attend
        if isinstance(store, HeavyHitterStore):
            assert isinstance(method, HeavyHitters)
            attend = AttendHeavyHitters(chunk, method, store, backbone.device)
        else:
            assert store is None or isinstance(store, EntrySlots)
            attend = self._attend_entries(chunk, store)
        hidden = self.run(chunk.input_ids, chunk.entries.position, attend)
        if not is_kept:
            return hidden, chunk  # and nothing that gradients need is overwritten
        if isinstance(attend, AttendHeavyHitters):
            attend.finish()
        elif isinstance(attend, AttendHeld):
            assert isinstance(store, EntrySlots)
            if chunk.has_events:
                last = torch.tensor([r.first_position + len(r.ids) for r in readings])
                store.drop_unreadable(last)
            else:
                store.fit()
        elif store is not None:
            assert isinstance(store, EntrySlots)
            store.fit()
        return hidden, chunk

    def _attend_entries(self, chunk: Chunk, slots: EntrySlots | None) -> AttendAtOnce | AttendHeld:
        backbone, method = self.backbone, self.method
        see_earlier = isinstance(method, Sentinel) and method.see_earlier
        sinks = None
        if isinstance(method, StreamingLLM) and backbone.rotation is not None:
            sinks = (method.first_tokens, method.max_entries, backbone.rotation)
        if slots is None or (slots.longest == 0 and not method.is_pooled and sinks is None):
            return AttendAtOnce(
                chunk.entries,
                slots,
                backbone.device,
                has_events=chunk.has_events,
                execution=self.execution,
                see_earlier=see_earlier,
            )
        return AttendHeld(chunk, slots, backbone.device, see_earlier=see_earlier, pooled=method.is_pooled, sinks=sinks)

    def run(
        self, input_ids: Int[Tensor, "rows entries"], position: Int[Tensor, "rows entries"], attend: Attend
    ) -> Float[Tensor, "rows entries hidden"]:
        """The model's final hidden states of tokens and sentinels under some attention."""
        backbone = self.backbone
        input_ids, position_ids = input_ids.to(backbone.device), position.long().to(backbone.device)
        if self.adapter is None:
            return backbone.forward(backbone.embed(input_ids), position_ids, attend)
        with self.adapter.acting_on(input_ids >= backbone.vocab_size):
            return backbone.forward(self.adapter.embed(backbone, input_ids), position_ids, attend)

    def check_length(self, num_tokens: int, what: str) -> None:
        """Raises `ContextOverflowError` past the trained length; `what` names the text."""
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
                f"past_key_values is a {type(cache).__name__}; a compressed model reads a CompressedCache: "
                "new_cache(rows)."
            )
        if cache.num_rows != batch:
            raise InputError(f"past_key_values holds {cache.num_rows} rows, input_ids has {batch}.")
        mine = self.identity
        differing = [name for name in mine if cache.identity.get(name) != mine[name]]
        if differing:
            raise InputError(
                "past_key_values was written by another model: "
                + "; ".join(f"{name} was {cache.identity.get(name)!r}, is {mine[name]!r}" for name in differing)
                + "."
            )


class _Parameters(nn.Module):
    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameters)

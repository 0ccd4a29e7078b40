"""A causal LM, compressed or whole, as the loop sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from thoughtformer.cache.compressed import CompressedCache
from thoughtformer.cache.rows import RowsCache
from thoughtformer.compression import CompressedModel
from thoughtformer.compression.method import read_ids
from thoughtformer.errors import InputError
from thoughtformer.rules.schedule import RowProgress
from thoughtformer.runners.base import ContextFollower, RequestContext, Runner, end_ids_of, identity_of
from thoughtformer.text.plain import document_tokenizer

__all__ = ["CausalLMRunner"]

#: Keys of a configuration that change nothing in what is held.
UNNAMED = ("_name_or_path", "allow_extrapolation", "architectures", "dtype", "torch_dtype", "transformers_version")


class CausalLMRunner(Runner):
    """A causal LM of transformers, or this package's plain GPT, that folds or drops a part of its context.

    Args:
        model: what `thoughtformer.compress` gives.
        tokenizer: the model's own, a fast one.
    """

    def __init__(self, model: CompressedModel, tokenizer: Any) -> None:
        self.model = model
        self.can_join, self.can_save = model.method.can_join, model.method.can_save
        self.can_speculate = model.new_cache(1).can_speculate
        self.tokenizer = document_tokenizer(tokenizer)
        model.eval()
        self.vocab_size = model.backbone.vocab_size
        self.is_gpthf = model.config.model_type == "gpthf"
        if self.is_gpthf and model.config.bos_token_id is not None:
            self.start_ids = (model.config.bos_token_id,)
        self.end_ids = end_ids_of(model, tokenizer, vocab_size=self.vocab_size, also=self.start_ids)
        self.exempt_ids = self.start_ids

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        ids, first = super().encode(text, start=start), self.model.generation_config.bos_token_id
        # As transformers does, where there is nothing to go on from.
        return ids if ids or not start or first is None else [first]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.model.device

    @property
    def max_tokens(self) -> int | None:
        return None if self.model.allow_extrapolation else self.model.backbone.max_tokens

    def check(self, ids: Sequence[int], number: int) -> None:
        if self.is_gpthf and any(token in self.start_ids for token in ids[1:]):
            raise InputError(
                f"prompt {number} starts a document (id {self.start_ids[0]}) inside: a compressed model reads one."
            )

    def read(
        self, ids: Sequence[Sequence[int]], most_tokens: int
    ) -> tuple[Float[Tensor, "rows vocab"], RowsCache, list[int]]:
        # One by one: these models read rows of unequal length with padding only.
        logits, joined, _ = self.read_on(ids[0], None, most_tokens)
        parts = [logits]
        for row in ids[1:]:
            logits, cache, _ = self.read_on(row, None, most_tokens)
            parts.append(logits)
            joined.join(cache)
        return torch.cat(parts), joined, [0] * len(ids)

    def read_on(
        self, ids: Sequence[int], cache: RowsCache | None, most_tokens: int
    ) -> tuple[Float[Tensor, "1 vocab"], RowsCache, int]:
        row_cache: RowsCache = self.model.new_cache(1) if cache is None else cache
        wanted = torch.zeros(1, len(ids), dtype=torch.bool)
        wanted[:, -1] = True
        return self._logits(torch.tensor([ids]), torch.ones_like(wanted), wanted, row_cache), row_cache, 0

    def step(self, ids: Sequence[int], cache: RowsCache) -> Float[Tensor, "rows vocab"]:
        new = torch.tensor(ids)[:, None]
        real = torch.ones_like(new, dtype=torch.bool)
        return self._logits(new, real, real, cache)

    def _verify(self, ids: Sequence[Sequence[int]], cache: RowsCache) -> Float[Tensor, "tokens vocab"]:
        new = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        real = torch.arange(new.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        return self._logits(new, real, real, cache)

    def _logits(
        self,
        ids: Int[Tensor, "rows new"],
        real: Bool[Tensor, "rows new"],
        wanted: Bool[Tensor, "rows new"],
        cache: RowsCache,
    ) -> Float[Tensor, "wanted vocab"]:
        assert isinstance(cache, CompressedCache)
        return self.model.backbone.logits(self.model.read(ids, real, cache, wanted=wanted))

    def most_entries(self, prompt: Sequence[int], num_new_tokens: int) -> dict[str, int]:
        model, method, row = self.model, self.model.method, RowProgress()
        most = [0] * len(model.num_stored(row))
        for token in [*prompt, *([] if method.reads_ids else [0] * num_new_tokens)]:
            read_ids(method, row, [token])
            most = [max(pair) for pair in zip(most, model.num_stored(row), strict=True)]
        if method.reads_ids:
            # Which tokens come isn't known. A fold makes the row no longer, unless it leaves several summaries.
            total, each = len(prompt) + num_new_tokens, max(1, method.num_summaries)
            longest = method.num_stored(row) + num_new_tokens
            most[0] = max(most[0], longest) if each == 1 else each * total
            for number, group in enumerate(model.groups[1:], start=1):
                assert group.window is not None
                most[number] = total if method.num_sentinels_read else min(total, group.window - 1)
        return {f"part {number}": entries for number, entries in enumerate(most)}

    def most_bytes(self, most_entries: Sequence[dict[str, int]], most_tokens: int) -> int:
        longest = [max(row[name] for row in most_entries) for name in most_entries[0]]
        return self.model.cache_bytes(longest, len(most_entries))

    def weights_state(self) -> bytes | None:
        return self.model.weights_state()

    def check_history(self, cache: RowsCache, ids: Sequence[int]) -> None:
        assert isinstance(cache, CompressedCache)
        self.model.check_history(cache, ids)

    def new_follower(self) -> ContextFollower:
        return _Follower(self)

    def parts(self, ids: Sequence[int]) -> tuple[str, list[str], str]:
        reading = read_ids(self.model.method, RowProgress(), list(ids))
        if not reading.events:
            return "", [], self.decode(ids)
        first, last = reading.events[0].start, reading.events[-1].end
        folds = [event for event in reading.events if event.is_fold]
        return (
            self.decode(ids[:first]),
            [self.decode(ids[event.start : event.end + 1]) for event in folds],
            self.decode(ids[last + 1 :]),
        )

    def identity(self) -> str:
        model = self.model
        made_by: list[Any] = [model.identity]
        made_by.append({name: value for name, value in model.config.to_dict().items() if name not in UNNAMED})
        made_by.append(None if model.adapter is None else asdict(model.adapter.config))
        return identity_of(model.identity["model"], made_by, model.dtype)


class _Follower(ContextFollower):
    """Tells what was folded, once: what the prompt made fold is in `Runner.parts`."""

    def __init__(self, runner: CausalLMRunner) -> None:
        self.runner = runner
        #: Where the text begins of which no fold was told; None before the first token.
        self.told: int | None = None

    def after(self, ids: Sequence[int], cache: RowsCache, index: int) -> RequestContext:
        assert isinstance(cache, CompressedCache)
        model = self.runner.model
        closed, still_open = cache.store.counts(index)
        start = cache.rows[index].next_start
        has_folded = self.told is not None and start > self.told
        folded = self.runner.decode(ids[self.told : start]) if has_folded else None
        self.told = start
        return RequestContext(
            closed_sentences=closed,
            open_tokens=still_open,
            held_bytes=model.cache_bytes([int(lengths[index]) for lengths in cache.store.lengths_by_part()], 1),
            plain_bytes=sum(
                min(len(ids), group.window or len(ids)) * model.backbone.kv_shape(group.layers).entry_bytes
                for group in model.groups
            ),
            folded=folded,
            rest=self.runner.decode(ids[start:]) if has_folded else None,
        )

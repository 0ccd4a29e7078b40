"""The rows that are being written, and what they hold: prefill of any rows, one step for all, joining and leaving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache import GPTHFCache
from thoughtformer.engine.rows import Row, RowContext, StreamEvent
from thoughtformer.engine.stored import StoredSentences
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.linear import pack_weights, unpack_weights
from thoughtformer.models.modeling_gpthf import compile_steps

__all__ = ["Batch"]


class Batch:
    """Rows that share each step; what a row writes never depends on the others.

    Args:
        model: in evaluation mode.
        sentences: known from before.
        pack: give the weights a second copy that is fast to read for few rows.
        compile: compile decoding of a single row.
    """

    def __init__(
        self, model: GPTHFForCausalLM, *, sentences: StoredSentences | None, pack: bool, compile: bool
    ) -> None:
        self.model = model
        self.sentences = sentences
        self.pack = pack
        self.compile = compile
        self.rows: list[Row] = []
        self.cache: GPTHFCache | None = None

    def num_bytes(self) -> int:
        """Held by the rows."""
        cache = self.cache  # once: another thread may ask while the last row leaves
        return 0 if cache is None else cache.num_bytes()

    def most_bytes(self, rows: Sequence[Row]) -> int:
        """What these rows may come to hold together, between steps."""
        if not rows:
            return 0
        longest = {stage: max(row.most_entries[stage] for row in rows) for stage in rows[0].most_entries}
        return self.model.model.cache_bytes(longest, len(rows), reserve_tokens=max(row.most_tokens for row in rows))

    @torch.inference_mode()
    def read(self, rows: Sequence[Row]) -> tuple[Float[Tensor, "rows vocab"], GPTHFCache]:
        """Reads whole prompts in one ragged pass, without padding; returns logits, and what was kept of them."""
        self._prepare()
        lengths = torch.tensor([len(row.ids) for row in rows])
        ids = torch.tensor([token for row in rows for token in row.ids], device=self.model.device)
        wanted = torch.zeros(len(ids), dtype=torch.bool)
        wanted[lengths.cumsum(0) - 1] = True
        cache = self.model.new_cache(len(rows))
        cache.reserve(max(row.most_tokens for row in rows))
        logits, output = self.model.ragged_logits(
            ids,
            torch.arange(len(rows)).repeat_interleave(lengths),
            cache,
            wanted=wanted,
            sentence_source=self.sentences,
        )
        for index, row in enumerate(rows):
            row.num_read = len(row.ids)
            if output.known_tokens is not None:
                row.num_known += int(output.known_tokens[index])
        return self._choices(logits, rows), cache

    @torch.inference_mode()
    def read_piece(self, row: Row, num_tokens: int) -> Float[Tensor, "1 vocab"]:
        """Reads a row's next tokens into the cache that it holds alone; logits after the last of them."""
        self._prepare()
        if row.held is None:
            row.held = self.model.new_cache(1)
        row.held.reserve(row.most_tokens)
        ids = torch.tensor(row.ids[row.num_read : row.num_read + num_tokens], device=self.model.device)
        wanted = torch.zeros(len(ids), dtype=torch.bool)
        wanted[-1] = True
        logits, output = self.model.ragged_logits(
            ids,
            torch.zeros(len(ids), dtype=torch.long),
            row.held,
            wanted=wanted,
            sentence_source=self.sentences,
        )
        row.num_read += len(ids)
        if output.known_tokens is not None:
            row.num_known += int(output.known_tokens[0])
        return self._choices(logits, [row])

    @torch.inference_mode()
    def step(self) -> Float[Tensor, "rows vocab"]:
        """Every row's last token, through the model."""
        assert self.cache is not None
        ids = torch.tensor([row.ids[-1] for row in self.rows], device=self.model.device)
        logits, _ = self.model.ragged_logits(ids, torch.arange(len(self.rows)), self.cache, num_columns=1)
        for row in self.rows:
            row.num_read = len(row.ids)
        return self._choices(logits, self.rows)

    def choose(self, logits: Float[Tensor, "rows vocab"], rows: Sequence[Row]) -> list[StreamEvent]:
        """Each row's next token, taken up by the row."""
        end_of_text = self.model.config.bos_token_id
        likeliest = logits.argmax(-1).tolist()
        events = []
        for index, row in enumerate(rows):
            try:
                token = likeliest[index] if row.params.is_plain_greedy else row.sampler.choose(row.ids, logits[index])
            except RuntimeError as error:  # no distribution to draw from: this row's affair alone
                row.error = error
                events.append(row.end("error"))
                continue
            event = row.accept(token, end_of_text)
            events.append(replace(event, context=self.context_of(row)) if row.wants_context else event)
        return events

    def context_of(self, row: Row) -> RowContext:
        """What a row of the batch holds."""
        assert self.cache is not None
        index, model = self.rows.index(row), self.model.model
        entries = {stage.name: int(stage.lengths[index]) for stage in self.cache.stages}
        config = model.config
        closing = (config.sentence_end_token_id, config.bos_token_id)
        ends = [place for place, token in enumerate(row.ids) if token in closing]
        shape = config.layer_shape("decoder")
        entry = 2 * config.num_hidden_layers * shape.num_kv_heads * shape.head_dim * model.dtype.itemsize
        return RowContext(
            closed_sentences=sum(row.ids[place] == config.sentence_end_token_id for place in ends),
            open_tokens=len(row.ids) - (ends[-1] + 1 if ends else 0),
            held_bytes=model.cache_bytes(entries, 1),
            plain_bytes=entry * (len(row.ids) - len(ends)),
        )

    def join(self, rows: Sequence[Row], cache: GPTHFCache) -> None:
        """Takes in rows that have been read, with what they hold, which is the batch's from now on."""
        for row in rows:
            row.held = None
        if self.cache is None or not self.rows:
            self.rows, self.cache = list(rows), cache
            return
        self.rows += rows
        self.cache.join(cache)
        self.cache.reserve(max(row.most_tokens for row in self.rows))

    def drop_ended(self) -> list[Row]:
        """Lets go of rows that have ended, and of their memory; those that keep their cache take it along."""
        writing = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        if len(writing) == len(self.rows) or self.cache is None:
            return []
        left = [row for row in self.rows if row.finish_reason is not None]
        num_bytes = self.num_bytes()
        for index, row in enumerate(self.rows):
            if row.finish_reason is not None:
                row.cache_bytes = num_bytes
                if row.keeps_cache and row.finish_reason in ("end_of_text", "stop_string", "length"):
                    row.held = self.cache.fork_rows(torch.tensor([index]))
                    row.held.reserve(0)
        self.rows = [self.rows[index] for index in writing]
        if self.rows:
            self.cache.select(torch.tensor(writing))
            self.cache.reserve(max(row.most_tokens for row in self.rows))
        else:
            self.cache = None
        return left

    def clear(self) -> list[Row]:
        """Lets go of everything; returns the rows."""
        rows, self.rows, self.cache = self.rows, [], None
        return rows

    def _prepare(self) -> None:
        """Before every prefill, because the weights may have changed since the last."""
        if self.pack:
            pack_weights(self.model)
        else:
            unpack_weights(self.model)
        compile_steps(self.model, enabled=self.compile)

    def _choices(self, logits: Float[Tensor, "rows vocab"], rows: Sequence[Row]) -> Float[Tensor, "rows vocab"]:
        """What each row may choose from."""
        logits, end = logits.float(), self.model.config.bos_token_id
        ignoring = [index for index, row in enumerate(rows) if row.params.ignore_end_of_text]
        if ignoring and end is not None:
            logits[ignoring, end] = float("-inf")
        return logits

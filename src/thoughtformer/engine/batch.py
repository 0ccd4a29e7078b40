"""The rows that are being written, and what they hold: prefill of any rows, one step for all, joining and leaving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from thoughtformer.cache.rows import RowsCache
from thoughtformer.engine.rows import Row, StreamEvent
from thoughtformer.runners.base import Reader

__all__ = ["Batch"]


class Batch:
    """Rows that share each step; what a row writes never depends on the others.

    Args:
        reader: the model.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.rows: list[Row] = []
        self.cache: RowsCache | None = None

    def num_bytes(self) -> int:
        """Held by the rows."""
        cache = self.cache  # once: another thread may ask while the last row leaves
        return 0 if cache is None else cache.num_bytes()

    @torch.inference_mode()
    def read(self, rows: Sequence[Row]) -> tuple[Float[Tensor, "rows vocab"], RowsCache]:
        """Reads whole prompts, without padding; returns logits, and what was kept of them."""
        self.reader.prepare()
        logits, cache, known = self.reader.read([row.ids for row in rows], max(row.most_tokens for row in rows))
        for row, num_known in zip(rows, known, strict=True):
            row.num_read = len(row.ids)
            row.num_known += num_known
        return self._choices(logits, rows), cache

    @torch.inference_mode()
    def read_piece(self, row: Row, num_tokens: int) -> Float[Tensor, "1 vocab"]:
        """Reads a row's next tokens into the cache that it holds alone; logits after the last of them."""
        self.reader.prepare()
        if row.origin is not None:
            # A copy: a request that fails leaves what it went on from as it was.
            row.held, row.origin = row.origin.fork_rows(torch.tensor([0])), None
        ids = row.ids[row.num_read : row.num_read + num_tokens]
        logits, row.held, num_known = self.reader.read_on(ids, row.held, row.most_tokens)
        row.num_read += len(ids)
        row.num_known += num_known
        return self._choices(logits, [row])

    @torch.inference_mode()
    def step(self) -> Float[Tensor, "rows vocab"]:
        """Every row's last token, through the model."""
        assert self.cache is not None
        logits = self.reader.step([row.ids[-1] for row in self.rows], self.cache)
        for row in self.rows:
            row.num_read = len(row.ids)
        return self._choices(logits, self.rows)

    def choose(self, logits: Float[Tensor, "rows vocab"], rows: Sequence[Row]) -> list[StreamEvent]:
        """Each row's next token, taken up by the row."""
        likeliest = logits.argmax(-1).tolist()
        events = []
        for index, row in enumerate(rows):
            try:
                token = likeliest[index] if row.params.is_plain_greedy else row.sampler.choose(row.ids, logits[index])
                event = row.accept(token)
                if row.follower is not None:
                    assert self.cache is not None
                    context = row.follower.after(row.ids, self.cache, self.rows.index(row))
                    event = replace(event, context=context)
            except Exception as error:  # no distribution to draw from, say: this row's affair alone
                row.error = error
                event = row.end("error")
            events.append(event)
        return events

    def join(self, rows: Sequence[Row], cache: RowsCache) -> None:
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
                if row.keeps_cache and row.has_ended_itself:
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

    def _choices(self, logits: Float[Tensor, "rows vocab"], rows: Sequence[Row]) -> Float[Tensor, "rows vocab"]:
        """What each row may choose from."""
        logits = logits.float()
        for index, row in enumerate(rows):
            row.sampler.leave_out(logits[index])
        return logits

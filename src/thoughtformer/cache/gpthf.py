"""What GPTHF holds between steps: a `transformers` cache whose stages drop what no later token may read.

Encoder: the open sentence. Body: one entry a closed sentence, plus the open sentence where the rule reads it. A plain
GPT's body holds every token. An hourglass's decoder holds the open sentence, and one summary a closed sentence.
State belongs to a row; rows never read each other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.cache.rows import RowsCache, check_accepted, distinct_storage_bytes
from thoughtformer.cache.stage import StageCache
from thoughtformer.rules import RowCounters, TokenStructure

__all__ = ["GPTHFCache"]


class GPTHFCache(RowsCache):
    """The generation state of some rows; `num_tokens` counts each row's own tokens."""

    def __init__(self, stages: list[StageCache], num_rows: int) -> None:
        super().__init__()
        self.stages = stages
        self.counters = RowCounters.zeros(num_rows)
        self.num_tokens = torch.zeros(num_rows, dtype=torch.long)
        self._pending: list[TokenStructure] = []
        self._committed = (self.counters, self.num_tokens, self.num_columns)

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self.counters)

    def by_name(self) -> dict[str, StageCache]:
        """The stages' caches by the names of the stages."""
        return {stage.name: stage for stage in self.stages}

    @property
    def is_fresh(self) -> bool:
        """Nothing has been read yet."""
        return not bool(self.num_tokens.any())

    def num_bytes(self) -> int:
        """Bytes of all distinct storages held, keys, values and bookkeeping."""
        tensors = [tensor for stage in self.stages for tensor in stage.tensors()]
        counters = [getattr(self.counters, field.name) for field in fields(self.counters)]
        return distinct_storage_bytes([*tensors, *counters, self.num_tokens])

    def reserve(self, num_tokens: int) -> None:
        """Makes room for rows of `num_tokens` in all, where every token is held, so that growing copies nothing.

        Stages that fold hold too little for that to matter. Room that an earlier call made and this one doesn't need is
        given back.
        """
        for stage in self.stages:
            stage.reserve(num_tokens)

    def record(self, tokens: TokenStructure, after: RowCounters, num_columns: int) -> None:
        """Moves the counters past `tokens`, to `after`; with `autocommit`, commits them."""
        self.counters = after
        is_step = tokens.is_one_a_row(self.num_rows)
        new = 1 if is_step else torch.bincount(tokens.row, minlength=self.num_rows)
        self.num_tokens = self.num_tokens + new
        self.num_columns += num_columns
        self._pending.append(tokens)
        if self.autocommit:
            self.commit()

    def commit(self, num_tokens: Int[Tensor, " rows"] | None = None) -> None:
        if num_tokens is not None:
            self._keep_first(num_tokens)
        # While no sentence closes and no document starts, most rules drop nothing of what was held.
        is_step = len(self._pending) == 1 and self._pending[0].is_one_a_row(self.num_rows)
        step = self._pending[0] if is_step and num_tokens is None else None
        if step is not None and (step.has_ends or not bool(step.position.all())):
            step = None
        for stage in self.stages:
            stage.commit(self.counters, step)
        self._pending = []
        self._committed = (self.counters, self.num_tokens, self.num_columns)

    def rollback(self) -> None:
        self.counters, self.num_tokens, self.num_columns = self._committed
        for stage in self.stages:
            stage.rollback()
        self._pending = []
        self.commit()

    def lengths(self) -> list[Int[Tensor, " rows"]]:
        """Entries of each row, stage by stage, uncommitted ones among them; for `restore`."""
        return [stage.lengths for stage in self.stages]

    def restore(self, lengths: list[Int[Tensor, " rows"]]) -> None:
        """Forgets entries written since `lengths` were taken, by a step that was not recorded."""
        for stage, length in zip(self.stages, lengths, strict=True):
            stage.lengths = length
            stage.fit()

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in that order; a row may be named more than once. Nothing may be uncommitted."""
        self._check_committed("select", is_committed=not self._pending)
        rows = rows.to(device="cpu", dtype=torch.long)
        for stage in self.stages:
            stage.select(rows)
        self.counters = self.counters.map(lambda field: field[rows])
        self.num_tokens = self.num_tokens[rows]
        self._committed = (self.counters, self.num_tokens, self.num_columns)

    def join(self, other: GPTHFCache) -> None:
        """Adds another cache's rows behind these; it is used up by that. Nothing may be uncommitted in either."""
        self._check_committed("join", is_committed=not self._pending and not other._pending)
        theirs = other.by_name()
        for name, stage in self.by_name().items():
            stage.join(theirs[name])
        self.counters = RowCounters(
            **{
                field.name: torch.cat([getattr(self.counters, field.name), getattr(other.counters, field.name)])
                for field in fields(RowCounters)
            }
        )
        self.num_tokens = torch.cat([self.num_tokens, other.num_tokens])
        self.num_columns = max(self.num_columns, other.num_columns)
        self._committed = (self.counters, self.num_tokens, self.num_columns)

    def fork_rows(self, rows: Int[Tensor, " selected"]) -> GPTHFCache:
        """A cache of the given rows, in storage of their own. Nothing may be uncommitted."""
        self._check_committed("fork_rows", is_committed=not self._pending)
        copied = copy.copy(self)
        copied.stages, copied._pending = [copy.copy(stage) for stage in self.stages], []
        copied.select(rows)
        return copied

    def saved(self) -> dict[str, Tensor]:
        """Everything held, by name; for `restore_saved`. Nothing may be uncommitted."""
        self._check_committed("saving", is_committed=not self._pending)
        saved = {f"counters.{field.name}": getattr(self.counters, field.name) for field in fields(RowCounters)}
        saved |= {"num_tokens": self.num_tokens}
        for name, stage in self.by_name().items():
            saved |= {f"{name}.{part}": tensor for part, tensor in stage.saved().items()}
        return saved

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave, of a cache of the same model and as many rows.

        Raises:
            KeyError, ValueError: something is missing, or of another shape.
        """
        for name, stage in self.by_name().items():
            prefix = f"{name}."
            stage.restore_saved({key.removeprefix(prefix): saved[key] for key in saved if key.startswith(prefix)})
        counters = {field.name: saved[f"counters.{field.name}"] for field in fields(RowCounters)}
        num_tokens = saved["num_tokens"]
        if any(tensor.shape != num_tokens.shape for tensor in counters.values()) or len(num_tokens) != self.num_rows:
            raise ValueError(f"counters of {len(num_tokens)} rows, not {self.num_rows}")
        self.counters, self.num_tokens = RowCounters(**counters), num_tokens
        self._pending = []
        self.commit()

    def reset(self) -> None:
        """Forgets everything; the rows stay."""
        self.counters = RowCounters.zeros(self.num_rows)
        self.num_tokens = torch.zeros_like(self.num_tokens)
        self.num_columns = 0
        for stage in self.stages:
            stage.lengths = torch.zeros_like(stage.lengths)
        self._pending = []
        self.commit()

    def _keep_first(self, num_tokens: Int[Tensor, " rows"]) -> None:
        counters, before, columns = self._committed
        pending = self.num_tokens - before
        check_accepted(num_tokens, pending)
        if torch.equal(num_tokens, pending):
            return
        tokens = self._all_pending()
        column = torch.arange(len(tokens)) - (pending.cumsum(0) - pending)[tokens.row]
        accepted: Bool[Tensor, " tokens"] = column < num_tokens[tokens.row]
        self.counters = counters.after(tokens[accepted])
        self.num_tokens = before + num_tokens
        self.num_columns = min(self.num_columns, columns + int(num_tokens.max()))
        for stage in self.stages:
            stage.truncate_uncommitted(tokens[accepted])

    def _all_pending(self) -> TokenStructure:
        """Uncommitted tokens, ordered by row, then by text."""
        joined = TokenStructure(
            **{
                field.name: torch.cat([getattr(part, field.name) for part in self._pending])
                for field in fields(TokenStructure)
            }
        )
        return joined[torch.argsort(joined.row, stable=True)]

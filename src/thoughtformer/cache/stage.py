"""The keys and values that one stage of layers holds, per row, under one visibility rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from thoughtformer.attention.cached import CachedAttention
from thoughtformer.cache.shape import KVShape
from thoughtformer.cache.slots import RowSlots
from thoughtformer.rules import RowCounters, TokenStructure, VisibilityRule

__all__ = ["FIELDS", "StageCache"]

#: What is known of an entry beside its keys and values.
FIELDS = ("document", "sentence", "offset", "position", "is_end")


class StageCache(RowSlots):
    """What a rule lets later tokens read.

    Each token writes `per_token` entries, each sentence end `per_end`. Uncommitted entries follow the committed ones;
    `commit` drops what the rule doesn't keep and gives blocks back, `rollback` drops the uncommitted.
    """

    def __init__(
        self,
        rule: VisibilityRule,
        shape: KVShape,
        device: torch.device,
        *,
        name: str,
        per_token: int = 1,
        per_end: int = 1,
    ) -> None:
        devices = [device] * shape.num_layers
        super().__init__(FIELDS, shape, devices, block_entries=rule.block_entries, block_growth=rule.block_growth)
        self.rule = rule
        self.name = name
        self.per_token = per_token
        self.per_end = per_end
        self._committed = self.lengths

    def reserve(self, num_tokens: int) -> None:
        """Allots room for `num_tokens` of each row at once, if the rule keeps them all; gives back what is more."""
        if self.rule.keeps_all:
            self.reserve_entries = num_tokens
            self.fit()

    def structure(self, slots: int) -> TokenStructure:
        """What is known of the first `slots` entries of each row, shape (rows, slots)."""
        fields = dict(zip(FIELDS, self.entries[:, :, :slots].long(), strict=True))
        is_end = fields.pop("is_end").bool()
        row = torch.arange(len(self.lengths))[:, None].expand(-1, slots)
        return TokenStructure(row=row, is_end=is_end, **fields)

    def extend(self, tokens: TokenStructure) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """Makes room for `tokens` behind each row's entries; returns the (row, slot) of each, for `write`."""
        return tokens.row, self.extend_rows(tokens.row, {name: getattr(tokens, name) for name in FIELDS})

    def cached_attention(self, tokens: TokenStructure, *, is_step: bool, written: int = 1) -> CachedAttention:
        """How `tokens` attend to their rows' slots, of which `written` a token were just written by `extend`.

        `is_step` says that the rows read one token each: a token that skips this stage may have closed the sentence or
        the document of what is held, and nothing here would tell.
        """
        num_rows, num_keys = len(self.lengths), self.longest
        if tokens.is_one_a_row(num_rows):
            query_index, output_index = torch.arange(num_rows)[:, None], None
            # Between passes nothing is held that the very next token can't read, unless it starts a document.
            same_length = is_step and bool((self.lengths == num_keys).all())
            is_committed = bool((self.lengths == self._committed + written).all())
            if same_length and is_committed and self.rule.all_cached_visible(tokens):
                return CachedAttention(query_index, None, None, num_keys)
            valid = torch.ones(num_rows, 1, dtype=torch.bool)
        else:
            count = torch.bincount(tokens.row, minlength=num_rows)
            column = torch.arange(len(tokens)) - (count.cumsum(0) - count)[tokens.row]
            width = int(count.max())
            query_index = torch.zeros(num_rows, width, dtype=torch.long)
            valid = torch.zeros(num_rows, width, dtype=torch.bool)
            query_index[tokens.row, column] = torch.arange(len(tokens))
            valid[tokens.row, column] = True
            output_index = tokens.row * width + column
        cached = self.structure(num_keys)
        mask = self.rule.visible(
            tokens[query_index].map(lambda field: field.unsqueeze(2)), cached.map(lambda field: field.unsqueeze(1))
        )
        mask &= (torch.arange(num_keys) < self.lengths[:, None]).unsqueeze(1)
        return CachedAttention(query_index, output_index, mask | ~valid.unsqueeze(2), num_keys)

    def commit(self, counters: RowCounters, step: TokenStructure | None = None) -> None:
        """Drops every entry that no query after `counters` may read, and gives back blocks no longer needed.

        `step` is given where one token a row is new, none of which closes a sentence or starts a document: by most
        rules the entries held before it then stay, and only its own are judged.
        """
        if step is not None and self.rule.drops_at_ends_only:
            if self.lengths is self._committed:
                return  # nothing was written
            self.lengths = self._committed + self.rule.keeps(step, counters)
            self.fit()
        else:
            self.keep(self.rule.keeps(self.structure(self.longest), counters))
        # One tensor for both: lengths are replaced, never written in place.
        self._committed = self.lengths

    def rollback(self) -> None:
        """Forgets what was written since the last commit."""
        self.lengths = self._committed

    def truncate_uncommitted(self, accepted: TokenStructure) -> None:
        """Keeps the uncommitted entries of each row's first tokens, which are `accepted`."""
        entries = torch.where(accepted.is_end, self.per_end, self.per_token)
        count = torch.zeros_like(self.lengths).index_add(0, accepted.row, entries)
        self.lengths = self._committed + count

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in that order, in storage of their own; a row may be named more than once."""
        super().select(rows)
        self._committed = self.lengths

    def join(self, other: RowSlots) -> None:
        """Adds another's rows behind these; both are committed."""
        super().join(other)
        self._committed = self.lengths

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave; all of it is committed."""
        super().restore_saved(saved)
        self._committed = self.lengths

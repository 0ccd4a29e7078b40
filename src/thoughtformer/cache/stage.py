"""The keys and values that one stage of layers holds, per row, under one visibility rule."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thoughtformer.attention import HeldAttention, RowCounters, TokenStructure, VisibilityRule

__all__ = ["StageCache", "stage_bytes"]

#: What is known of an entry beside its keys and values.
FIELDS = ("document", "sentence", "offset", "position", "is_end")


def _capacity(entries: int, block_entries: int) -> int:
    """Slots allotted for `entries` held: whole blocks, with one slot to spare for the token under way."""
    return -(-(entries + 1) // block_entries) * block_entries


def stage_bytes(
    rule: VisibilityRule,
    *,
    num_layers: int,
    num_rows: int,
    longest_row_entries: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """Bytes of a committed stage cache, block rounding included; what `StageCache.num_bytes()` must measure."""
    slots = num_rows * _capacity(longest_row_entries, rule.block_entries)
    kv_bytes = 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
    return slots * (kv_bytes + len(FIELDS) * 4) + num_rows * 8


class StageCache:
    """Entries of each row in text order, in slots 0 to `lengths[row]`.

    Rows share one tensor a layer, allotted in whole blocks for the longest row. Uncommitted entries follow the
    committed ones; `commit` drops what the rule doesn't keep and gives blocks back, `rollback` drops the uncommitted.
    """

    def __init__(
        self,
        rule: VisibilityRule,
        *,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rule = rule
        shape = (num_rows, num_kv_heads, _capacity(0, rule.block_entries), head_dim)
        # Zeroed, not empty: slots past a row's length are masked, but 0 times not-a-number is not 0.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.entries = torch.zeros(len(FIELDS), num_rows, shape[2], dtype=torch.int32)
        self.lengths = torch.zeros(num_rows, dtype=torch.long)
        self._committed = self.lengths

    @property
    def capacity(self) -> int:
        """Slots allotted to each row."""
        return self.entries.shape[2]

    def tensors(self) -> list[Tensor]:
        """Everything held, for byte accounting."""
        return [*self.keys, *self.values, self.entries, self.lengths]

    def structure(self, slots: int) -> TokenStructure:
        """What is known of the first `slots` entries of each row, shape (rows, slots)."""
        fields = dict(zip(FIELDS, self.entries[:, :, :slots].long(), strict=True))
        is_end = fields.pop("is_end").bool()
        row = torch.arange(len(self.lengths))[:, None].expand(-1, slots)
        return TokenStructure(row=row, is_end=is_end, **fields)

    def extend(self, tokens: TokenStructure) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """Makes room for `tokens` behind each row's entries; returns the (row, slot) of each, for `write`."""
        index = torch.arange(len(tokens))
        is_first = torch.ones(len(tokens), dtype=torch.bool)
        is_first[1:] = tokens.row[1:] != tokens.row[:-1]
        row_start = torch.cummax(torch.where(is_first, index, 0), dim=0).values
        slot = self.lengths[tokens.row] + index - row_start
        self.lengths = self.lengths.index_add(0, tokens.row, torch.ones_like(slot))
        capacity = _capacity(max(int(self.lengths.max()) - 1, 0), self.rule.block_entries)
        if capacity > self.capacity:
            self._resize(capacity)
        for number, field in enumerate(FIELDS):
            self.entries[number, tokens.row, slot] = getattr(tokens, field).to(torch.int32)
        return tokens.row, slot

    def write(
        self,
        layer: int,
        row: Int[Tensor, " tokens"],
        slot: Int[Tensor, " tokens"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
    ) -> None:
        """Stores one layer's keys and values in the slots that `extend` gave."""
        self.keys[layer][row, :, slot] = key
        self.values[layer][row, :, slot] = value

    def held_attention(self, tokens: TokenStructure) -> HeldAttention:
        """How `tokens`, already extended, attend to their rows' slots."""
        num_rows, num_keys = len(self.lengths), int(self.lengths.max())
        if tokens.is_one_a_row(num_rows):
            query_index, output_index = torch.arange(num_rows)[:, None], None
            same_length = bool((self.lengths == num_keys).all())
            is_committed = bool((self.lengths == self._committed + 1).all())
            if same_length and is_committed and self.rule.all_held_visible(tokens):
                return HeldAttention(query_index, None, None, num_keys)
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
        held = self.structure(num_keys)
        mask = self.rule.visible(
            tokens[query_index].map(lambda field: field.unsqueeze(2)), held.map(lambda field: field.unsqueeze(1))
        )
        mask &= (torch.arange(num_keys) < self.lengths[:, None]).unsqueeze(1)
        return HeldAttention(query_index, output_index, mask | ~valid.unsqueeze(2), num_keys)

    def commit(self, counters: RowCounters, step: TokenStructure | None = None) -> None:
        """Drops every entry that no query after `counters` may read, and gives back blocks no longer needed.

        `step` is given where one token a row is new, none of which closes a sentence or starts a document: then the
        entries held before it stay, and only its own are judged.
        """
        if step is not None:
            kept_new = self.rule.keeps(step, counters)
            self.lengths = self._committed = self._committed + kept_new
            self._fit()
            return
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        held = self.structure(longest)
        kept = self.rule.keeps(held, counters) & (torch.arange(longest) < self.lengths[:, None])
        lengths = kept.sum(dim=1)
        misplaced = kept & (torch.arange(longest) >= lengths[:, None])
        if bool(misplaced.any()):
            # Kept entries move down in order; the slots before the first gap of any row stay where they are.
            first_gap = int((~kept).long().argmax(dim=1)[misplaced.any(dim=1)].min())
            source = torch.argsort((~kept).to(torch.int8), dim=1, stable=True)[:, first_gap : int(lengths.max())]
            self._move(source, first_gap)
        # One tensor for both: lengths are replaced, never written in place.
        self.lengths = self._committed = lengths
        self._fit()

    def rollback(self) -> None:
        """Forgets what was written since the last commit."""
        self.lengths = self._committed

    def truncate_uncommitted(self, num_tokens: Int[Tensor, " rows"]) -> None:
        """Keeps the first `num_tokens` uncommitted entries of each row."""
        self.lengths = torch.minimum(self.lengths, self._committed + num_tokens)

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in that order, in storage of their own; a row may be named more than once."""
        on_device = rows.to(self.keys[0].device) if self.keys else rows
        self.keys = [key.index_select(0, on_device) for key in self.keys]
        self.values = [value.index_select(0, on_device) for value in self.values]
        self.entries = self.entries.index_select(1, rows)
        self.lengths = self._committed = self.lengths[rows]
        self._fit()

    def _fit(self) -> None:
        """Allots exactly the blocks that the entries need."""
        capacity = _capacity(int(self.lengths.max()) if len(self.lengths) else 0, self.rule.block_entries)
        if capacity != self.capacity:
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        shared = min(capacity, self.capacity)

        def resized(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = capacity
            new = tensor.new_zeros(shape)
            new.narrow(dim, 0, shared).copy_(tensor.narrow(dim, 0, shared))
            return new

        for layer in range(len(self.keys)):
            self.keys[layer] = resized(self.keys[layer], 2)
            self.values[layer] = resized(self.values[layer], 2)
        self.entries = resized(self.entries, 2)

    def _move(self, source: Int[Tensor, "rows moved"], first: int) -> None:
        last = first + source.shape[1]
        self.entries[:, :, first:last] = self.entries.gather(2, source.expand(len(FIELDS), -1, -1))
        on_device = source.to(self.keys[0].device) if self.keys else source
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                index = on_device[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
                tensor[:, :, first:last] = tensor.gather(2, index)

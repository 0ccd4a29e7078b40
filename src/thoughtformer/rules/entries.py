"""Entries of a compressed text, and who may read them: one rule for every compression method.

An entry is a token, or one of the sentinels that fold a span of tokens. Tokens are numbered by `position`; each entry
says from which token on it may be read (`since`) and up to which (`until`). Dropping a token is setting its `until`;
folding a span drops its tokens, and lets its summaries be read from the next token on. Example: t3 t4 folded right
after t4 ("." for what is never read, position ids below):

              t1 t2 CL t3 t4 CR t5 t6
        t3     x  x  .  x  .  .  .  .
        t4     x  x  .  x  x  .  .  .
        CR     .  .  x  x  x  x  .  .
        t5     x  x  .  .  .  x  x  .
    position   0  1  1  2  3  3  4  5

Sentinels read their own span alone (arXiv 2310.08152, section 3.1), so it doesn't matter when they are computed: a
span may be folded long after it was read (a lag). Only `since` and `until` move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from thoughtformer.attention.blocks import AttentionPlan, PlanBuilder
from thoughtformer.rules.plans import BLOCK_QUERIES

__all__ = ["FOREVER", "OPEN", "PADDING", "TOKEN", "Entries", "entries_mask", "entries_plan"]

#: What an entry is, its `order`: a token, the sentinel that opens a span, its summaries from `OPEN + 1` on, nothing.
TOKEN, OPEN, PADDING = 0, 1, -1
#: The `until` of what is never dropped, and the `since` of what is never read.
FOREVER = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Entries:
    """What the rule needs to know of each entry; all of one shape, (rows, entries) unless said otherwise.

    Attributes:
        position: number of its row's earlier tokens; `OPEN` copies the position before its span (0 at the start),
            summaries the span's last.
        order: `TOKEN`, `OPEN`, `OPEN + i` for a span's summary number i, or `PADDING`.
        span: which of the row's spans a sentinel and the tokens it reads belong to; -1 for none.
        since: first position whose token may read it.
        until: last position whose token may read it.
    """

    position: Int[Tensor, "*shape"]
    order: Int[Tensor, "*shape"]
    span: Int[Tensor, "*shape"]
    since: Int[Tensor, "*shape"]
    until: Int[Tensor, "*shape"]

    def map(self, change: Callable[[Tensor], Tensor]) -> Entries:
        """The same change to every field."""
        return Entries(*(change(getattr(self, field.name)) for field in fields(self)))

    def __getitem__(self, index: object) -> Entries:
        return self.map(lambda field: field[index])  # type: ignore[index]

    def to(self, device: torch.device) -> Entries:
        return self if self.position.device == device else self.map(lambda field: field.to(device))

    def beside(self, other: Entries) -> Entries:
        """These entries, then `other`'s, row by row."""
        return Entries(
            *(torch.cat([getattr(self, field.name), getattr(other, field.name)], dim=-1) for field in fields(self))
        )


def visible(query: Entries, key: Entries, *, see_earlier: bool = False) -> Bool[Tensor, "*both"]:
    """Whether each query may read each key, elementwise over fields that broadcast.

    Args:
        query, key: entries of the same row.
        see_earlier: summaries also read the summaries of spans folded before theirs.
    """
    by_token = (key.since <= query.position) & (query.position <= key.until)
    by_sentinel = (key.span == query.span) & (key.order <= query.order)
    # A span's opening reads itself alone.
    by_sentinel = by_sentinel & ((query.order != OPEN) | (key.order == OPEN))
    if see_earlier:
        earlier = (key.since < query.since) | ((key.since == query.since) & (key.span < query.span))
        by_sentinel = by_sentinel | (earlier & (key.order > OPEN) & (query.order > OPEN))
    return torch.where(query.order == TOKEN, by_token, by_sentinel) & (key.order != PADDING)


def entries_mask(query: Entries, key: Entries, *, see_earlier: bool = False) -> Bool[Tensor, "rows queries keys"]:
    """`mask[r, i, j]`: whether query i of row r reads key j. Padded queries read all, so that no row is empty."""
    queries, keys = query.map(lambda field: field.unsqueeze(-1)), key.map(lambda field: field.unsqueeze(-2))
    return visible(queries, keys, see_earlier=see_earlier) | (queries.order == PADDING)


def entries_plan(entries: Entries, *, see_earlier: bool = False, block_queries: int = BLOCK_QUERIES) -> AttentionPlan:
    """The same as `entries_mask(entries, entries)` by gathered blocks, over the entries of all rows laid end to end."""
    num_rows, num_entries = entries.order.shape
    queries = entries.map(lambda field: field.unsqueeze(-1))
    keys = entries.map(lambda field: field.unsqueeze(-2))
    padding = queries.order == PADDING
    mask = visible(queries, keys, see_earlier=see_earlier)
    # A padded query reads itself, so that its row is not empty, and nothing more has to be gathered for it.
    mask |= padding & torch.eye(num_entries, dtype=torch.bool)
    width = min(block_queries, num_entries)
    num_blocks = -(-num_entries // width)
    padded = torch.nn.functional.pad(mask, (0, 0, 0, num_blocks * width - num_entries))
    blocks = padded.view(num_rows * num_blocks, width, num_entries)
    first_entry = torch.arange(num_rows).repeat_interleave(num_blocks) * num_entries
    column = (torch.arange(num_blocks) * width)[:, None] + torch.arange(width)
    column = column.repeat(num_rows, 1)
    valid = column < num_entries
    builder = PlanBuilder(num_rows * num_entries)
    keys = first_entry[:, None] + torch.arange(num_entries)
    builder.add_read(first_entry[:, None] + torch.where(valid, column, 0), valid, keys, blocks)
    return builder.build()

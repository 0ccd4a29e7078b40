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

from thoughtformer.attention.blocks import AttentionPlan
from thoughtformer.rules.plans import BLOCK_QUERIES, plan_of_runs

__all__ = ["FOREVER", "OPEN", "PADDING", "TOKEN", "Entries", "entries_mask", "entries_plan", "in_window"]

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


def in_window(entries: Entries, window: int) -> Entries:
    """The entries as a layer sees them whose tokens read the last `window` tokens, themselves included.

    Such a layer forgets by itself: what is dropped or folded elsewhere stays readable while it is near, and no token
    reads a summary. Sentinels read their span here as well, however far back it is.
    """
    is_token = entries.order == TOKEN
    since = torch.where(is_token, entries.since, FOREVER)
    until = torch.where(is_token, entries.position + (window - 1), entries.until)
    return Entries(position=entries.position, order=entries.order, span=entries.span, since=since, until=until)


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
    flat = entries.map(torch.flatten)

    def reads(
        query: Int[Tensor, "blocks queries"], key: Int[Tensor, "blocks keys"]
    ) -> Bool[Tensor, "blocks queries keys"]:
        query, key = query.unsqueeze(2), key.unsqueeze(1)
        queries = flat[query]
        # A padded query reads itself, so that its row is not empty, and nothing more has to be gathered for it.
        return visible(queries, flat[key], see_earlier=see_earlier) | ((queries.order == PADDING) & (query == key))

    length = torch.full((num_rows,), num_entries)
    return plan_of_runs(torch.arange(num_rows) * num_entries, length, reads, block_queries=block_queries)

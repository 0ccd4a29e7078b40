"""Sentinel tokens (Ren, Jia, Zhu, arXiv 2310.08152): the model itself folds a span into the keys and values of <CR>."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from thoughtformer.attention.schedule import Event, RowProgress
from thoughtformer.checks import check_count
from thoughtformer.compression.method import Method
from thoughtformer.compression.policies import Policy, RemovedFraction

__all__ = ["Sentinel"]


@dataclass(frozen=True, kw_only=True)
class Sentinel(Method):
    """Folds spans into `num_sentinels` summaries each.

    Args:
        policy: when to fold.
        num_sentinels: the k summary tokens `<CR>` of a span, as the adapter was trained; they read one another in
            order.
        see_earlier: summaries also read those of spans folded before, as the adapter was trained.
    """

    name = "sentinel"
    needs_adapter = True
    policy: Policy = field(default_factory=RemovedFraction)
    num_sentinels: int = 1
    see_earlier: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_sentinels", self.num_sentinels, 1)

    @property
    def num_summaries(self) -> int:
        return self.num_sentinels

    @property
    def reads_ids(self) -> bool:
        return self.policy.reads_ids

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        return self.policy.events(row, token_id, self.num_sentinels)

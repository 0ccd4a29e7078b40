"""Sentinel tokens (Ren, Jia, Zhu, arXiv 2310.08152): the model itself folds a span into the keys and values of <CR>."""

from __future__ import annotations

from dataclasses import dataclass

from thoughtformer.checks import check_count
from thoughtformer.compression.folding import Folding

__all__ = ["Sentinel"]


@dataclass(frozen=True, kw_only=True)
class Sentinel(Folding):
    """Folds spans into `num_sentinels` summaries each.

    Args:
        policy: when to fold.
        num_sentinels: the k summary tokens `<CR>` of a span, as the adapter was trained; they read one another in
            order.
        see_earlier: summaries also read those of spans folded before, as the adapter was trained.
    """

    name = "sentinel"
    needs_adapter = True
    trained_settings = ("num_sentinels", "see_earlier")
    num_sentinels: int = 1
    see_earlier: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_sentinels", self.num_sentinels, 1)

    @property
    def num_summaries(self) -> int:
        return self.num_sentinels

    @property
    def summaries_read_earlier(self) -> bool:
        return self.see_earlier

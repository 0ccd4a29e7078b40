"""Block summaries after Combiner-Fixed (Ren et al., arXiv 2107.05768, section 4.2), without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from thoughtformer.attention.schedule import Event, RowProgress
from thoughtformer.compression.method import Method
from thoughtformer.compression.policies import Policy, RemovedFraction

__all__ = ["Combiner"]


@dataclass(frozen=True, kw_only=True)
class Combiner(Method):
    """Folds each block into the mean of its keys and the mean of its values, weighed as many.

    A summary of n tokens with key K and value V takes part in softmax with exp(q K + log n), which is exact where all
    keys of the block are equal. The paper learns its summaries' query-independent weights; here they are uniform. Its
    blocks are folded as they finish: `EveryTokens(span_tokens=n, recent_tokens=0, first_tokens=0, start_tokens=0)`.
    """

    name = "combiner"
    is_pooled = True
    policy: Policy = field(default_factory=RemovedFraction)

    @property
    def num_summaries(self) -> int:
        return 1

    @property
    def reads_ids(self) -> bool:
        return self.policy.reads_ids

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        return self.policy.events(row, token_id, 1)

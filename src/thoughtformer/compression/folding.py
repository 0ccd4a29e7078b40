"""What methods share that fold spans when a policy says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from thoughtformer.compression.method import LayersShape, Method
from thoughtformer.compression.policies import Policy, RemovedFraction
from thoughtformer.compression.solving import Search
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["Folding"]

FoldingKind = TypeVar("FoldingKind", bound="Folding")


@dataclass(frozen=True, kw_only=True)
class Folding(Method):
    """Folds spans into `num_summaries` each, when `policy` says so."""

    policy: Policy = field(default_factory=RemovedFraction)

    @property
    def reads_ids(self) -> bool:
        return self.policy.reads_ids

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        return self.policy.events(row, token_id, self.num_summaries)

    @property
    def needs_tokenizer(self) -> bool:
        return self.policy.needs_tokenizer

    def for_tokenizer(self: FoldingKind, tokenizer: Any) -> FoldingKind:
        return replace(self, policy=self.policy.with_tokenizer(tokenizer))

    def num_awaited(self, row: RowProgress, before: int) -> int:
        if not self.num_sentinels_read:
            return 0
        # Spans are folded in text order: what stays raw is before the first, or behind the last.
        first = self.policy.first_tokens
        return min(first, before) + max(before - max(row.next_start, first), 0)

    def bound(self: FoldingKind, shape: LayersShape) -> FoldingKind:
        policy = self.policy.bound(
            bytes_per_entry=shape.kv.entry_bytes,
            num_summaries=self.num_summaries,
            window_bytes=[(window, kv.entry_bytes) for window, kv in shape.windows],
            holds_spans=self.num_sentinels_read > 0,
        )
        return replace(self, policy=policy)

    @property
    def can_save(self) -> bool:
        return self.policy.can_save

    @classmethod
    def from_removed(cls: type[FoldingKind], removed: float, **settings: Any) -> FoldingKind:
        """By `RemovedFraction`, whose other settings may be given as well."""
        of_policy = [field.name for field in fields(RemovedFraction)]
        policy = {name: settings.pop(name) for name in list(settings) if name in of_policy}
        return cls(policy=RemovedFraction(removed=removed, **policy), **settings)

    @classmethod
    def at_entries(cls: type[FoldingKind], search: Search) -> Iterator[FoldingKind]:
        settings = {name: search.trained[name] for name in cls.trained_settings if name in search.trained}
        for span in search.spans(cls(**settings).num_summaries):
            yield search.crossing(
                lambda fraction, span=span: cls(policy=RemovedFraction(removed=fraction, span_tokens=span), **settings),
                search.fractions,
            )

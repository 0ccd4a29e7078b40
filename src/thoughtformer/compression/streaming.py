"""StreamingLLM (Xiao et al., arXiv 2309.17453): the first tokens and a recent window, with positions in the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from thoughtformer.attention.schedule import Event, RowProgress
from thoughtformer.checks import check_count
from thoughtformer.compression.method import Method
from thoughtformer.errors import ConfigError

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Holds the first tokens, attention's sinks, and the most recent ones, `max_entries` in all.

    With rotary positions, distances are those inside the cache (section 3.2): the window's are the text's own, the
    sinks stay `max_entries` away. Models with learned positions have them inside their keys, so there they stay.
    """

    name = "streaming"
    max_entries: int = 64
    first_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first_tokens", self.first_tokens, 0)
        check_count("max_entries", self.max_entries, 1)
        if self.max_entries <= self.first_tokens:
            raise ConfigError(
                f"max_entries={self.max_entries} leaves no window beside first_tokens={self.first_tokens}."
            )

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        if row.num_tokens >= self.max_entries:
            position = row.num_tokens - self.max_entries + self.first_tokens
            yield Event(position, position, row.num_tokens - 1)

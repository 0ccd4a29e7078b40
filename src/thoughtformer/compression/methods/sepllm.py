"""SepLLM (Chen et al., arXiv 2412.12094): the entries of separators stay, with the first and the recent ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from thoughtformer.checks import check_count
from thoughtformer.compression.method import Method
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError
from thoughtformer.rules.schedule import Event, RowProgress

__all__ = ["SepLLM"]

#: The paper's separators (section 4.1).
SEPARATORS = ".,?!;: \t\n"


@dataclass(frozen=True, kw_only=True)
class SepLLM(Method):
    """A token reads the first tokens, earlier separators, and the last `recent_tokens`, itself among them.

    Separators are tokens of nothing but `.,?!;:` and white space. With `max_separators`, only the last so many stay.

    Args:
        first_tokens: that stay.
        recent_tokens: a window.
        max_separators: that stay outside of both; None: all.
        separator_ids: None for what a tokenizer tells: `compress(..., tokenizer=tokenizer)`.
    """

    name = "sepllm"
    first_tokens: int = 4
    recent_tokens: int = 64
    max_separators: int | None = None
    separator_ids: frozenset[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.separator_ids, Iterable):
            object.__setattr__(self, "separator_ids", frozenset(self.separator_ids))
        super().__post_init__()
        check_count("first_tokens", self.first_tokens, 0)
        check_count("recent_tokens", self.recent_tokens, 1)
        if self.max_separators is not None:
            check_count("max_separators", self.max_separators, 0)

    @property
    def reads_ids(self) -> bool:
        return True

    @property
    def window_tokens(self) -> int:
        # The next token has a place in the window.
        return self.recent_tokens - 1

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        # A window of the token itself alone forgets it at once.
        return self.leaving(row, row.num_tokens - 1, token_id) if self.window_tokens == 0 else ()

    def leaving(self, row: RowProgress, position: int, token_id: int) -> Iterable[Event]:
        if position < self.first_tokens:
            return
        gone = position
        if token_id in (self.separator_ids or ()):
            if self.max_separators is None:
                return
            # Notes: where the separators are that stay.
            row.notes.append(position)
            if len(row.notes) <= self.max_separators:
                return
            gone = int(row.notes.pop(0))
        yield Event(gone, gone, row.num_tokens - 1)

    @property
    def needs_tokenizer(self) -> bool:
        return self.separator_ids is None

    def for_tokenizer(self, tokenizer: Any) -> SepLLM:
        if not self.needs_tokenizer:
            return self
        texts = ((token_id, tokenizer.decode([token_id])) for token_id in range(len(tokenizer)))
        return replace(
            self, separator_ids=frozenset(token_id for token_id, text in texts if text and not text.strip(SEPARATORS))
        )

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[SepLLM]:
        if search.tokenizer is None:
            raise ConfigError(f"{cls.name} goes by the tokenizer's separators, and none was given.")
        separators = cls().for_tokenizer(search.tokenizer).separator_ids
        for first_tokens in (4, 2):
            yield search.crossing(
                lambda recent, first=first_tokens: cls(
                    first_tokens=first, recent_tokens=recent, max_separators=3 * recent, separator_ids=separators
                ),
                range(1, search.num_tokens),
            )

"""When spans are folded: by fraction removed, every n tokens, within a budget, at sentence ends, or as you say.

A policy is asked after every token. It names the span to fold next, always the first tokens that are still raw, except
those at the text's start that stay raw for good; or nothing. Folding follows from the row's own past alone, so that
reading at once and reading token by token fold alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from thoughtformer.checks import check_count, check_fields, check_fraction
from thoughtformer.errors import ConfigError, ContextOverflowError
from thoughtformer.rules.schedule import Event, RowProgress

#: Every policy by name.
POLICIES: dict[str, type[Policy]] = {}

__all__ = [
    "POLICIES",
    "ByteBudget",
    "Callback",
    "EntryBudget",
    "EveryTokens",
    "Policy",
    "RemovedFraction",
    "SentenceEnds",
]


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """When to fold.

    Args:
        first_tokens: tokens at the start that stay raw; models read much off them whatever they are (arXiv 2309.17453).
        recent_tokens: the last tokens stay raw: the lag between a span's end and its folding is at least this.
        start_tokens: nothing is folded before so many tokens were read.
    """

    name: ClassVar[str]
    #: When to fold depends on which tokens are read.
    reads_ids: ClassVar[bool] = False
    #: A file can say how it goes on.
    can_save: ClassVar[bool] = True
    first_tokens: int = 4
    recent_tokens: int = 16
    start_tokens: int = 64

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            known = POLICIES.setdefault(cls.name, cls)
            # A class that is defined anew, as notebooks do, replaces its own.
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"two policies are called {cls.name!r}: {known.__qualname__} and {cls.__qualname__}.")
            POLICIES[cls.name] = cls

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("first_tokens", "recent_tokens", "start_tokens"):
            check_count(name, getattr(self, name), 0)

    @property
    def needs_tokenizer(self) -> bool:
        """It goes by token ids that `with_tokenizer` has yet to find."""
        return False

    def with_tokenizer(self, tokenizer: Any) -> Policy:
        """This policy for a model's tokenizer."""
        return self

    def bound(
        self,
        *,
        bytes_per_entry: int,
        num_summaries: int,
        window_bytes: Sequence[tuple[int, int]] = (),
        holds_spans: bool = False,
    ) -> Policy:
        """This policy for a model whose entries take so many bytes; as `Method.bound`.

        Args:
            bytes_per_entry, window_bytes: as there.
            num_summaries: of a span.
            holds_spans: layers with a window hold tokens until they are folded.
        """
        return self

    def events(self, row: RowProgress, token_id: int, num_summaries: int) -> Iterator[Event]:
        """The spans to fold now."""
        at = row.num_tokens - 1
        row.next_start = max(row.next_start, self.first_tokens)
        if row.num_tokens < self.start_tokens:
            return
        num_cached = row.num_cached
        while True:
            length = self.span_length(
                row, num_cached, row.num_tokens - self.recent_tokens - row.next_start, num_summaries
            )
            if length is None:
                return
            event = Event(row.next_start, row.next_start + length - 1, at, True)
            row.next_start = event.end + 1
            num_cached -= length - num_summaries
            yield event

    @abstractmethod
    def span_length(self, row: RowProgress, num_cached: int, available: int, num_summaries: int) -> int | None:
        """How many tokens to fold from `row.next_start` on, at most `available`; None for nothing now."""


@dataclass(frozen=True, kw_only=True)
class RemovedFraction(Policy):
    """Folds the oldest spans as long as more entries are held than `1 - removed` of the tokens seen.

    `removed` counts everything held. Early in a text the tokens that stay raw may be more than that.
    """

    name = "removed"
    removed: float = 0.9
    span_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("removed", self.removed)
        check_count("span_tokens", self.span_tokens, 2)

    def span_length(self, row: RowProgress, num_cached: int, available: int, num_summaries: int) -> int | None:
        is_due = num_cached + 1 > (1 - self.removed) * (row.num_tokens + 1)
        return self.span_tokens if is_due and available >= self.span_tokens else None


@dataclass(frozen=True, kw_only=True)
class EveryTokens(Policy):
    """Folds every `span_tokens` tokens, as soon as `recent_tokens` have followed."""

    name = "every"
    span_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("span_tokens", self.span_tokens, 2)

    def span_length(self, row: RowProgress, num_cached: int, available: int, num_summaries: int) -> int | None:
        return self.span_tokens if available >= self.span_tokens else None


@dataclass(frozen=True, kw_only=True)
class EntryBudget(Policy):
    """Folds the oldest spans as long as more than `max_entries` are held."""

    name = "entries"
    max_entries: int = 128
    span_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("span_tokens", self.span_tokens, 2)
        check_count("max_entries", self.max_entries, self.first_tokens + self.recent_tokens + self.span_tokens)

    def span_length(self, row: RowProgress, num_cached: int, available: int, num_summaries: int) -> int | None:
        if num_cached < self.max_entries:
            return None
        if available >= self.span_tokens:
            return self.span_tokens
        raise ContextOverflowError(
            f"after {row.num_tokens} tokens {num_cached} entries are held, as many as max_entries={self.max_entries} "
            f"allows, and all but {max(available, 0)} raw tokens are summaries or must stay raw. Raise the budget, or "
            f"span_tokens={self.span_tokens}, which decides how many summaries there are."
        )


@dataclass(frozen=True, kw_only=True)
class ByteBudget(Policy):
    """Folds the oldest spans as long as a row's keys and values take more than `max_bytes`."""

    name = "bytes"
    max_bytes: int = 1 << 20
    span_tokens: int = 16

    def bound(
        self,
        *,
        bytes_per_entry: int,
        num_summaries: int,
        window_bytes: Sequence[tuple[int, int]] = (),
        holds_spans: bool = False,
    ) -> Policy:
        least = self.first_tokens + self.recent_tokens + self.span_tokens
        # A window is never folded. Beside it, whatever is still raw may wait there for sentinels.
        in_windows = sum((window - 1) * size for window, size in window_bytes)
        bytes_per_entry += holds_spans * sum(size for _, size in window_bytes)
        entries = max(self.max_bytes - in_windows, 0) // bytes_per_entry
        if entries < least:
            beside = f" beside {in_windows} bytes of layers with a window" if in_windows else ""
            raise ConfigError(
                f"max_bytes={self.max_bytes} is room for {entries} entries of {bytes_per_entry} bytes{beside}, but "
                "first_tokens + recent_tokens + span_tokens are "
                f"{least}. Give at least {in_windows + least * bytes_per_entry}."
            )
        return EntryBudget(
            first_tokens=self.first_tokens,
            recent_tokens=self.recent_tokens,
            start_tokens=self.start_tokens,
            max_entries=entries,
            span_tokens=self.span_tokens,
        )

    def span_length(self, row: RowProgress, num_cached: int, available: int, num_summaries: int) -> int | None:
        raise ConfigError("a ByteBudget must be bound to a model first: thoughtformer.compress does it.")


@dataclass(frozen=True, kw_only=True)
class SentenceEnds(Policy):
    """Folds each sentence once `recent_tokens` have followed it.

    A sentence ends with one of `end_ids`, after at least `min_tokens`, and at `max_tokens` in any case. Ends are told
    from ids alone, so that no later character can change them: "Dr." ends one. Without `end_ids`, a tokenizer finds
    them: `compress(..., tokenizer=tokenizer)`, or `for_tokenizer`.
    """

    name = "sentences"
    reads_ids = True
    end_ids: frozenset[int] | None = None
    min_tokens: int = 4
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.end_ids, Iterable):
            object.__setattr__(self, "end_ids", frozenset(self.end_ids))
        super().__post_init__()
        check_count("min_tokens", self.min_tokens, 2)
        check_count("max_tokens", self.max_tokens, self.min_tokens)

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, ends: str = ".!?\n", **settings: Any) -> SentenceEnds:
        """The policy for a tokenizer: tokens whose text ends with one of `ends`, quotes after it allowed."""
        ids = range(len(tokenizer))
        texts = (tokenizer.decode([token_id]).rstrip("\"'\u201d\u2019) ") for token_id in ids)
        return cls(
            end_ids=frozenset(i for i, text in zip(ids, texts, strict=True) if text.endswith(tuple(ends))), **settings
        )

    @property
    def needs_tokenizer(self) -> bool:
        return self.end_ids is None

    def with_tokenizer(self, tokenizer: Any) -> SentenceEnds:
        return replace(self, end_ids=self.for_tokenizer(tokenizer).end_ids) if self.needs_tokenizer else self

    def events(self, row: RowProgress, token_id: int, num_summaries: int) -> Iterator[Event]:
        # Notes: the ends found and not yet folded, as numbers of tokens; last, where the open sentence starts.
        if not row.notes:
            row.notes = [self.first_tokens]
        length = row.num_tokens - row.notes[-1]
        if length >= self.max_tokens or (length >= self.min_tokens and token_id in (self.end_ids or ())):
            row.notes.append(row.num_tokens)
        yield from super().events(row, token_id, num_summaries)

    def span_length(self, row: RowProgress, num_cached: int, available: int, num_summaries: int) -> int | None:
        if len(row.notes) < 2 or row.notes[1] - row.next_start > available:
            return None
        length = int(row.notes[1]) - row.next_start
        del row.notes[0]
        return length


@dataclass(frozen=True, kw_only=True)
class Callback(Policy):
    """Folds as `choose` says: given the row and the number of raw tokens that may be folded, how many of the oldest.

    `choose` must be a function of its arguments, else reading at once and token by token would differ.
    """

    name = "callback"
    can_save = False
    choose: Callable[[RowProgress, int], int | None]

    def span_length(self, row: RowProgress, num_cached: int, available: int, num_summaries: int) -> int | None:
        if available < 1:
            return None
        length = self.choose(replace(row, num_cached=num_cached), available)
        if length is not None and not 1 <= length <= available:
            raise ConfigError(f"the callback asked to fold {length} tokens; {available} may be folded.")
        return length

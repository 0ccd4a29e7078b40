"""What a compression method is: a frozen dataclass that says, token by token, what is dropped or folded.

A method is one file in `compression/methods/`, called by its name; being there registers it. All that differs between
methods is asked of them here; nothing else knows one by its class.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch

from thoughtformer.cache.entries import BLOCK_ENTRIES, ENTRY_FIELDS, EntrySlots, Store
from thoughtformer.cache.shape import KVShape
from thoughtformer.cache.slots import slots_bytes
from thoughtformer.checks import check_fields
from thoughtformer.compression.at_once import AttendAtOnce
from thoughtformer.compression.on_cache import AttendOnCache
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError, UnsupportedError
from thoughtformer.models.backbone import Attend, Backbone
from thoughtformer.rules.schedule import Chunk, Event, RowProgress, RowReading

__all__ = ["METHODS", "CacheBytes", "LayersShape", "Method", "PassAttention", "cached_entries", "read_ids"]

#: Every method by name.
METHODS: dict[str, type[Method]] = {}

#: Bytes of a cache: all that it stores, what of that is in memory, and what a step reads of it.
CacheBytes = Literal["stored", "resident", "read"]

MethodKind = TypeVar("MethodKind", bound="Method")


@runtime_checkable
class PassAttention(Attend, Protocol):
    """The attention of one forward pass, called layer by layer, with an end."""

    def finish(self) -> None:
        """All layers are done: what no later token may read is dropped from the store."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayersShape:
    """Of the layers that a method acts on, what their entries take.

    Attributes:
        kv: shape of their keys and values, of one row.
        num_heads: of queries.
        max_tokens: positions that the model was trained for.
        windows: of other layers, by group: their window, and the shape of their keys and values.
    """

    kv: KVShape
    num_heads: int
    max_tokens: int
    windows: Sequence[tuple[int, KVShape]] = ()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A rule of what later tokens may still read."""

    name: ClassVar[str]
    #: It folds by sentinels, which need an adapter.
    needs_adapter: ClassVar[bool] = False
    #: Settings that must be as the adapter was trained, called as in `AdapterConfig`.
    trained_settings: ClassVar[tuple[str, ...]] = ()
    #: What stays is decided at each token, one at a time, also where a text is read at once.
    decides_each_token: ClassVar[bool] = False
    #: Fields that `bound` finds from the model, which nobody is to set.
    found_settings: ClassVar[tuple[str, ...]] = ()
    #: Rows of its caches can be joined, as the engine does.
    can_join: ClassVar[bool] = True
    #: Gradients pass through it.
    can_train: ClassVar[bool] = True
    #: A text goes through a store also when no cache is kept.
    needs_store: ClassVar[bool] = False
    #: What is known of an entry beside its key and value; who adds some brings an attention that writes them.
    entry_fields: ClassVar[tuple[str, ...]] = ENTRY_FIELDS

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            known = METHODS.setdefault(cls.name, cls)
            # A class that is defined anew, as notebooks do, replaces its own.
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"two methods are called {cls.name!r}: {known.__qualname__} and {cls.__qualname__}.")
            METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        check_fields(self)

    # What happens to tokens.

    @property
    def num_summaries(self) -> int:
        """Entries that stay of a folded span."""
        return 0

    @property
    def num_sentinels_read(self) -> int:
        """Of those, how many are tokens that the model reads."""
        return self.num_summaries

    @property
    def summaries_read_earlier(self) -> bool:
        """Summaries also read those of spans folded before."""
        return False

    @property
    def reads_ids(self) -> bool:
        """What happens depends on which tokens are read, not on their number alone."""
        return False

    @property
    def window_tokens(self) -> int:
        """The last so many tokens are remembered, and `leaving` is asked as each leaves them."""
        return 0

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        """What happens now that token number `row.num_tokens - 1` was read. May change `next_start` and `notes`.

        Asked once for each token, in order, whether the text is read at once or token by token: the answer may depend
        on the row's own past alone.
        """
        return ()

    #: Some of a text is read again, at moments that `rereads` tells.
    can_reread: ClassVar[bool] = False

    def rereads(self, num_tokens: int) -> range | None:
        """Positions whose tokens are read once more when so many have been read; `window_tokens` covers them."""
        return None

    def attend_again(self, chunk: Chunk, store: Store, *, backbone: Backbone) -> PassAttention:
        """The attention of that, in whose end the method drops what it will; its tokens are stored nowhere."""
        raise NotImplementedError

    def leaving(self, row: RowProgress, position: int, token_id: int) -> Iterable[Event]:
        """What happens now that the token at `position` is no longer one of the last `window_tokens`."""
        return ()

    def num_stored(self, row: RowProgress) -> int:
        """Entries that a store holds of a row."""
        return row.num_cached

    def stored_parts(self, row: RowProgress) -> tuple[int, ...]:
        """The same for each part of a store that is sized by itself."""
        return (self.num_stored(row),)

    def in_window(self, window: int) -> Method | None:
        """What holds layers whose tokens read the last `window` alone; None: what is near is held raw."""
        return None

    def num_awaited(self, row: RowProgress, before: int) -> int:
        """Tokens before a position that layers with a window hold as well, because sentinels have yet to read them."""
        return 0

    # What it takes.

    @property
    def needs_tokenizer(self) -> bool:
        """It goes by token ids that `for_tokenizer` has yet to find."""
        return False

    def for_tokenizer(self: MethodKind, tokenizer: Any) -> MethodKind:
        """The method for a model's tokenizer."""
        return self

    def bound(self: MethodKind, shape: LayersShape) -> MethodKind:
        """The method for a model whose layers have this shape."""
        return self

    #: It computes its own scores, and knows nothing of what a model's attention does to them.
    computes_scores: ClassVar[bool] = False

    def check(self, backbone: Backbone) -> None:
        """Raises `UnsupportedError` for a model that the method can't be exact on."""
        if self.computes_scores and backbone.shapes_scores is not None:
            raise UnsupportedError(
                f"{type(backbone.model).__name__} {backbone.shapes_scores}, and {self.name} computes scores of its "
                "own. Take a method that leaves them to the model."
            )

    @property
    def can_save(self) -> bool:
        """A file can say how it goes on."""
        return True

    @classmethod
    def from_removed(cls: type[MethodKind], removed: float, **settings: Any) -> MethodKind:
        """The method that removes a fraction of all that it has read; asked where `removed` isn't a setting of its own.

        Raises:
            ConfigError: it holds what it holds, whatever a text's length.
        """
        names = " or ".join(field.name for field in fields(cls))
        raise ConfigError(
            f"{cls.name} holds a number of entries, whatever a text's length, so removed={removed} can't be asked of "
            f"it: give {names}."
            if names
            else f"{cls.name} removes nothing, so removed={removed} can't be asked of it."
        )

    @classmethod
    def at_entries(cls: type[MethodKind], search: Search) -> Iterator[MethodKind]:
        """Settings that hold about as many entries as `search.target`, best first; those too far off are passed over.

        Raises:
            ConfigError: it can't be set so.
        """
        raise ConfigError(f"{cls.name} can't be set to hold a number of entries: it has no at_entries.")

    # How it is kept and attended to.

    @property
    def kind(self) -> str:
        """What the entries of its caches are; caches of one kind alone fit one another."""
        return "entries"

    def new_store(self, shape: KVShape, devices: Sequence[torch.device]) -> Store:
        """Where keys and values go, each layer's on its device."""
        return EntrySlots(self.entry_fields, shape, devices, block_entries=BLOCK_ENTRIES)

    def store_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        """What a store's tensors must measure, block rounding included, by the longest row in each of its parts."""
        (longest,) = longest_row_entries
        return slots_bytes(len(self.entry_fields), longest, shape, block_entries=BLOCK_ENTRIES)

    def resident_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        """What of `store_bytes` is in memory."""
        return self.store_bytes(longest_row_entries, shape)

    def read_bytes(self, longest_row_entries: Sequence[int], shape: KVShape) -> int:
        """What of `store_bytes` a step reads."""
        return self.store_bytes(longest_row_entries, shape)

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        """The attention of a pass over new entries, which extends the store if there is one."""
        assert store is None or isinstance(store, EntrySlots)
        # That writes only what is kept: of no use where some of it may be taken back.
        if store is None or (store.longest == 0 and not store.waits):
            return AttendAtOnce(
                chunk.entries,
                store,
                has_events=chunk.has_events,
                execution=execution,
                see_earlier=self.summaries_read_earlier,
            )
        return AttendOnCache(chunk, store, see_earlier=self.summaries_read_earlier)


def read_ids(method: Method, row: RowProgress, ids: list[int]) -> RowReading:
    """Reads new tokens: their events, with `row` moved past them."""
    first, events, window = row.num_tokens, [], method.window_tokens
    for token_id in ids:
        row.num_tokens += 1
        row.num_cached += 1
        for event in _events(method, row, token_id, window):
            row.num_cached -= event.end - event.start + 1 - (method.num_summaries if event.is_fold else 0)
            events.append(event)
    return RowReading(ids, first, events)


def _events(method: Method, row: RowProgress, token_id: int, window: int) -> Iterator[Event]:
    yield from method.after(row, token_id)
    if window:
        row.window.append(token_id)
        if len(row.window) > window:
            yield from method.leaving(row, row.num_tokens - 1 - window, row.window.pop(0))


def cached_entries(method: Method, ids: Sequence[int]) -> list[int]:
    """Entries that each token of a text can read, itself included, by the schedule alone."""
    row, cached = RowProgress(), []
    for token_id in ids:
        cached.append(row.num_cached + 1)
        read_ids(method, row, [token_id])
    return cached

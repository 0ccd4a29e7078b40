"""H2O (Zhang et al., arXiv 2306.14048): each head holds what was attended to most, and what is recent."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thoughtformer.cache.entries import BLOCK_ENTRIES, Store
from thoughtformer.checks import check_count, check_fraction
from thoughtformer.compression.method import Method, PassAttention
from thoughtformer.compression.on_devices import OnDevices
from thoughtformer.compression.solving import Search
from thoughtformer.errors import UnsupportedError
from thoughtformer.models.backbone import Backbone, Original
from thoughtformer.rules.entries import TOKEN
from thoughtformer.rules.schedule import Chunk, Event, RowProgress

__all__ = ["AttendHeavyHitters", "HeavyHitterStore", "HeavyHitters"]


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(Method):
    """Holds `max_entries` for each layer and key head; when full, the least attended of the older ones makes room.

    What is attended is summed over all queries since the token was read, and over the query heads that share the key
    head (algorithm 1, with grouped heads taken together).
    """

    name = "h2o"
    can_join = False
    can_train = False
    computes_scores = True
    needs_store = True
    max_entries: int = 64
    recent_fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_entries", self.max_entries, 2)
        check_fraction("recent_fraction", self.recent_fraction)

    @property
    def recent_tokens(self) -> int:
        """The last tokens, which are never dropped."""
        return min(max(1, round(self.max_entries * self.recent_fraction)), self.max_entries - 1)

    def after(self, row: RowProgress, token_id: int) -> Iterable[Event]:
        # Which token goes is the heads' own affair; here only how many are held.
        row.num_cached = min(row.num_cached, self.max_entries - 1)
        return ()

    def num_stored(self, row: RowProgress) -> int:
        return min(row.num_tokens, row.num_cached + 1)

    @classmethod
    def at_entries(cls, search: Search) -> Iterator[HeavyHitters]:
        yield search.crossing(lambda entries: cls(max_entries=entries), search.budgets)

    @property
    def kind(self) -> str:
        return f"at most {self.max_entries} a head"

    def new_store(self, **shape: Any) -> Store:
        return HeavyHitterStore(self.max_entries, **shape)

    def store_bytes(
        self,
        *,
        longest_row_entries: int,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> int:
        slots = min(-(-max(longest_row_entries, 1) // BLOCK_ENTRIES) * BLOCK_ENTRIES, self.max_entries)
        exact = torch.promote_types(dtype, torch.float32).itemsize
        return num_layers * num_rows * num_kv_heads * slots * (2 * head_dim * dtype.itemsize + exact + 4) + num_rows * 8

    def attend(self, chunk: Chunk, store: Store | None, *, backbone: Backbone, execution: str) -> PassAttention:
        assert isinstance(store, HeavyHitterStore)
        return AttendHeavyHitters(chunk, self, store)


class HeavyHitterStore(Store):
    """Keys and values by layer, row, head and slot, with each slot's position and the attention that it got.

    A new token takes the slot of the one that makes room, so that a full store never moves anything.
    """

    def __init__(
        self,
        max_entries: int,
        *,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
    ) -> None:
        self.max_entries = max_entries
        devices = [device] * num_layers if isinstance(device, torch.device) else device
        shape = (num_rows, num_kv_heads, min(BLOCK_ENTRIES, max_entries))
        self.keys = [torch.zeros(*shape, head_dim, dtype=dtype, device=place) for place in devices]
        self.values = [torch.zeros(*shape, head_dim, dtype=dtype, device=place) for place in devices]
        exact = torch.promote_types(dtype, torch.float32)
        self.attention = [torch.zeros(shape, dtype=exact, device=place) for place in devices]
        self.position = [torch.full(shape, -1, dtype=torch.int32, device=place) for place in devices]
        self.lengths = torch.zeros(num_rows, dtype=torch.long)

    def tensors(self) -> list[Tensor]:
        """Everything held, for byte accounting."""
        return [*self.keys, *self.values, *self.attention, *self.position, self.lengths]

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps the given rows, in that order, in storage of their own."""
        for tensors in (self.keys, self.values, self.attention, self.position):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor.index_select(0, rows.to(tensor.device))
        self.lengths = self.lengths[rows]

    def saved(self) -> dict[str, Tensor]:
        """What is held, by name."""
        saved = {"lengths": self.lengths}
        for name in ("keys", "values", "attention", "position"):
            saved |= {f"{name}.{layer}": tensor.clone() for layer, tensor in enumerate(getattr(self, name))}
        return saved

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave; raises `KeyError` and `ValueError`."""
        self.lengths = saved["lengths"].cpu()
        for name in ("keys", "values", "attention", "position"):
            for layer, tensor in enumerate(getattr(self, name)):
                found = saved[f"{name}.{layer}"]
                if found.shape[:2] != tensor.shape[:2]:
                    raise ValueError(f"{name}.{layer} has shape {tuple(found.shape)}")
                getattr(self, name)[layer] = found

    def fork_rows(self, rows: Int[Tensor, " selected"]) -> HeavyHitterStore:
        """A store of the given rows, in storage of its own."""
        copied = copy.copy(self)
        for name in ("keys", "values", "attention", "position"):
            setattr(copied, name, list(getattr(self, name)))  # `select` fills them with new tensors
        copied.select(rows)
        return copied

    def join(self, other: Store) -> None:
        """Refused."""
        raise UnsupportedError("rows of heavy hitters can't be joined: each head holds entries of its own.")

    def snapshot(self, *, whole: bool) -> HeavyHitterStore | None:
        """A copy before several passes; before one nothing: a full store overwrites what it drops, and copying it at
        every step would double what it costs."""
        return copy.deepcopy(self) if whole else None

    def restored(self, snapshot: Any) -> HeavyHitterStore:
        """The store as it was when `snapshot` was taken."""
        return snapshot

    def check_positions(self, row: int, num_tokens: int) -> None:
        """Raises `ValueError` if a row's entries are of positions that its text doesn't have."""
        for position in self.position:
            if bool((position[row] >= num_tokens).any() | (position[row] < -1).any()):
                raise ValueError("its entries are of positions that its text doesn't have")

    def clear(self) -> None:
        """Forgets everything; the rows stay."""
        for tensor in self.attention:
            tensor.zero_()
        for tensor in self.position:
            tensor.fill_(-1)
        self.lengths = torch.zeros_like(self.lengths)

    def make_room(self, num_entries: int) -> None:
        """Allots slots for the longest row, in blocks, up to the budget."""
        wanted = min(-(-num_entries // BLOCK_ENTRIES) * BLOCK_ENTRIES, self.max_entries)
        more = wanted - self.attention[0].shape[2]
        if more <= 0:
            return
        for tensors, filling in ((self.keys, 0), (self.values, 0), (self.attention, 0), (self.position, -1)):
            for layer, tensor in enumerate(tensors):
                shape = list(tensor.shape)
                shape[2] = more
                tensors[layer] = torch.cat([tensor, tensor.new_full(shape, filling)], dim=2)


class AttendHeavyHitters:
    """One layer after another, one token after another: what a token may read depends on what those before it read."""

    def __init__(self, chunk: Chunk, method: HeavyHitters, store: HeavyHitterStore) -> None:
        entries = chunk.entries
        self.store, self.method = store, method
        self.is_new = OnDevices(entries.order == TOKEN)
        self.position = OnDevices(entries.position)
        num_seen = torch.where(entries.order == TOKEN, entries.position, -1).amax(dim=1) + 1
        self.lengths = torch.maximum(store.lengths, num_seen.long().clamp(max=method.max_entries))
        store.make_room(int(self.lengths.max()) if len(self.lengths) else 0)

    def finish(self) -> None:
        """All layers are done: the rows hold the new tokens."""
        self.store.lengths = self.lengths

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "batch heads seq head_dim"],
        key: Float[Tensor, "batch kv_heads seq head_dim"],
        value: Float[Tensor, "batch kv_heads seq head_dim"],
        *,
        scale: float,
        dropout: float,
        original: Original,
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        batch, heads, seq, head_dim = query.shape
        kv_heads = key.shape[1]
        query = query.reshape(batch, kv_heads, heads // kv_heads, seq, head_dim)
        output = torch.zeros_like(query)
        new = self.is_new.at(query.device)
        for column in range(seq):
            is_new = new[:, column]
            weights = self._step(layer, query[:, :, :, column], key[:, :, column], value[:, :, column], column, scale)
            output[:, :, :, column] = weights @ self.store.values[layer]
            self.store.attention[layer] += weights.sum(dim=2) * is_new[:, None, None]
        return output.reshape(batch, heads, seq, head_dim)

    def _step(
        self,
        layer: int,
        query: Float[Tensor, "batch kv_heads groups head_dim"],
        key: Float[Tensor, "batch kv_heads head_dim"],
        value: Float[Tensor, "batch kv_heads head_dim"],
        column: int,
        scale: float,
    ) -> Float[Tensor, "batch kv_heads groups slots"]:
        """Writes one token a row, and returns what its queries attend to."""
        store = self.store
        position, is_new = self.position.at(key.device)[:, column], self.is_new.at(key.device)[:, column]
        slot = self._victim(layer, position)
        index = slot[..., None]
        for cached, new in ((store.keys[layer], key), (store.values[layer], value)):
            place = index[..., None].expand(-1, -1, 1, cached.shape[3])
            old = cached.gather(2, place)
            cached.scatter_(2, place, torch.where(is_new[:, None, None, None], new.unsqueeze(2), old))
        for tensor, new in ((store.attention[layer], 0), (store.position[layer], position[:, None, None])):
            fresh = torch.as_tensor(new, dtype=tensor.dtype, device=tensor.device).expand_as(index)
            tensor.scatter_(2, index, torch.where(is_new[:, None, None], fresh, tensor.gather(2, index)))
        is_cached: Bool[Tensor, "batch kv_heads 1 slots"] = (store.position[layer] >= 0).unsqueeze(2)
        # A padded query of a row that holds nothing reads everything, so that it is a number.
        is_cached = is_cached | ~is_cached.any(dim=3, keepdim=True)
        scores = (query @ store.keys[layer].mT) * scale
        return scores.masked_fill(~is_cached, float("-inf")).softmax(dim=-1)

    def _victim(self, layer: int, position: Int[Tensor, " batch"]) -> Int[Tensor, "batch kv_heads"]:
        """The slot that the token at `position` takes: a free one, or that of the least attended among the older."""
        cached, attention = self.store.position[layer], self.store.attention[layer]
        is_recent = cached > (position - 1 - self.method.recent_tokens)[:, None, None]
        # Ties go to the oldest.
        worth = attention.masked_fill(is_recent, float("inf"))
        least = worth.amin(dim=2, keepdim=True)
        oldest = torch.where(worth == least, cached, torch.iinfo(torch.int32).max)
        taken = oldest.argmin(dim=2)
        free = position.clamp(max=self.method.max_entries)[:, None].expand_as(taken).long()
        return torch.where(free < self.method.max_entries, free, taken)

"""What a compressed model holds between steps: a `transformers` cache from which dropped entries are really gone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from thoughtformer.cache.entries import Store
from thoughtformer.cache.rows import RowsCache, check_accepted, distinct_storage_bytes
from thoughtformer.errors import UnsupportedError
from thoughtformer.rules.schedule import RowProgress, RowReading

__all__ = ["CompressedCache"]


class CompressedCache(RowsCache):
    """The generation state of some rows of a compressed model.

    What is still held is in `num_entries`. Keys keep the rotation of their own position wherever they are stored.
    """

    def __init__(self, store: Store, rows: list[RowProgress], identity: dict[str, Any]) -> None:
        super().__init__()
        self.store = store
        self.rows = rows
        #: Each row's uncommitted ids, what was committed, and what reads ids; None where nothing is uncommitted.
        self._pending: list[list[int]] | None = None
        self._committed: Any = None
        self._read: Any = None
        #: Which model, adapter and method wrote it: it can be read by no other.
        self.identity = identity

    @property
    def can_speculate(self) -> bool:
        """Whether `autocommit` can be turned off."""
        return self.store.can_wait

    @property
    def written_by(self) -> str:
        """The method."""
        return f"the method {self.identity['method']!r}"

    def record(
        self,
        rows: list[RowProgress],
        ids: Sequence[Sequence[int]],
        num_columns: int,
        read: Callable[[RowProgress, list[int]], RowReading],
    ) -> None:
        """Moves the rows past new ids, to `rows`; with `autocommit`, commits them. `read` reads a row's ids anew."""
        if self._pending is not None or not self.autocommit:
            self._pending = [[*old, *new] for old, new in zip(self._pending or [[]] * len(ids), ids, strict=True)]
            self._read = read
        self.rows = rows
        self.num_columns += num_columns
        if self._pending is not None and self.autocommit:
            self.commit()

    def begin(self) -> None:
        """Called before each pass: marks where to go back to, if the pass is the first that isn't committed."""
        self.store.wait(not self.autocommit)
        if self._pending is None and not self.autocommit:
            self._committed = (self.store.mark(), self.rows, self.num_columns)

    def commit(self, num_tokens: Int[Tensor, " rows"] | None = None) -> None:
        pending = self._pending or [[] for _ in self.rows]
        counts = torch.tensor([len(ids) for ids in pending], dtype=torch.long)
        if num_tokens is not None:
            check_accepted(num_tokens, counts)
        if self._pending is None:
            return
        if num_tokens is None or torch.equal(num_tokens, counts):
            self.store.commit(self.num_tokens)
        else:
            mark, rows, num_columns = self._committed
            self.rows = [row.copy() for row in rows]
            accepted = [ids[:count] for ids, count in zip(pending, num_tokens.tolist(), strict=True)]
            self.store.commit_first(mark, [self._read(row, ids) for row, ids in zip(self.rows, accepted, strict=True)])
            self.num_columns = min(self.num_columns, num_columns + int(num_tokens.max()))
        self._forget_pending()

    def rollback(self) -> None:
        if self._pending is None:
            return
        mark, self.rows, self.num_columns = self._committed
        self.store.back_to(mark)
        self._forget_pending()

    def _forget_pending(self) -> None:
        self._pending = self._committed = self._read = None

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self.rows)

    @property
    def num_tokens(self) -> Int[Tensor, " rows"]:
        """Tokens that each row has read."""
        return torch.tensor([row.num_tokens for row in self.rows])

    @property
    def num_entries(self) -> Int[Tensor, " rows"]:
        """Entries that each row still holds."""
        return self.store.lengths

    @property
    def is_fresh(self) -> bool:
        """Nothing has been read yet."""
        return not any(row.num_tokens for row in self.rows)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Entries held by the longest row with the new ones, and how many columns fewer that is than were seen."""
        physical = int(self.num_entries.max()) if self.num_rows else 0
        return physical + query_length, self.num_columns - physical

    def num_bytes(self) -> int:
        """Bytes of all distinct storages held, keys, values and bookkeeping, unused parts of blocks included."""
        return distinct_storage_bytes(self.store.tensors())

    def live_bytes(self, bytes_per_entry: int) -> int:
        """Bytes of keys and values that some later token can read."""
        return int(self.num_entries.sum()) * bytes_per_entry

    def select(self, rows: Int[Tensor, " selected"] | Sequence[int]) -> None:
        """Keeps the given rows, in that order; a row may be named more than once."""
        self._check_committed("select", is_committed=self._pending is None)
        rows = torch.as_tensor(rows).to(device="cpu", dtype=torch.long)
        self.store.select(rows)
        self.rows = [self.rows[row].copy() for row in rows.tolist()]

    def join(self, other: CompressedCache) -> None:
        """Adds another cache's rows behind these; it is used up by that.

        Raises:
            UnsupportedError: a store whose rows can't be joined, or another model's.
        """
        self._check_committed("join", is_committed=self._pending is None and other._pending is None)
        if self.identity != other.identity:
            raise UnsupportedError("caches that different models, adapters or methods wrote can't be joined.")
        self.store.join(other.store)
        self.rows += other.rows
        self.num_columns = max(self.num_columns, other.num_columns)

    def fork_rows(self, rows: Int[Tensor, " selected"]) -> CompressedCache:
        """A cache of the given rows, in storage of their own."""
        self._check_committed("fork_rows", is_committed=self._pending is None)
        rows = torch.as_tensor(rows).to(device="cpu", dtype=torch.long)
        copied = copy.copy(self)
        copied.store = self.store.fork_rows(rows)
        copied.rows = [self.rows[row].copy() for row in rows.tolist()]
        return copied

    def saved(self) -> dict[str, Tensor]:
        """Everything held, by name, and how far each row is."""
        self._check_committed("saving", is_committed=self._pending is None)
        saved = self.store.saved()
        for number, row in enumerate(self.rows):
            saved[f"progress.{number}"] = torch.tensor([row.num_tokens, row.num_cached, row.next_start])
            saved[f"notes.{number}"] = torch.tensor(row.notes, dtype=torch.float64)
            if row.window:
                saved[f"window.{number}"] = torch.tensor(row.window)
        return saved | {"num_columns": torch.tensor(self.num_columns)}

    def restore_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `saved` gave, of a cache of the same model and as many rows.

        Raises:
            KeyError, ValueError: something is missing, or of another shape.
        """
        rows = []
        for number in range(self.num_rows):
            num_tokens, num_cached, next_start = saved[f"progress.{number}"].tolist()
            notes: list[float] = [
                int(note) if note.is_integer() else note for note in saved[f"notes.{number}"].tolist()
            ]
            window = saved[f"window.{number}"].tolist() if f"window.{number}" in saved else []
            rows.append(RowProgress(num_tokens, num_cached, next_start, notes, window))
        num_columns = int(saved["num_columns"])
        self.store.restore_saved(saved)
        self.rows, self.num_columns = rows, num_columns
        self._forget_pending()

    def snapshot(self, *, whole: bool) -> Any:
        """What `restore` needs to undo a forward pass, or, if `whole`, several."""
        return self.store.snapshot(whole=whole)

    def restore(self, snapshot: Any) -> None:
        """Undoes a pass that failed; a store of which nothing was kept is emptied, and so the cache."""
        if snapshot is None:
            self.reset()
        else:
            self.store = self.store.restored(snapshot)

    def reset(self) -> None:
        """Forgets everything; the rows stay."""
        self.rows = [RowProgress() for _ in self.rows]
        self.num_columns = 0
        self._forget_pending()
        self.store.clear()

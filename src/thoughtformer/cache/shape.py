"""How many keys and values there is a place for, and of what kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["KVShape"]


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """Of the keys and values of some rows in some layers.

    Attributes:
        num_layers: layers.
        num_rows: rows.
        num_kv_heads: of a layer.
        head_dim: numbers of a key, or of a value.
        dtype: of each number.
    """

    num_layers: int
    num_rows: int = 1
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def head_bytes(self) -> int:
        """Key and value of an entry, in one layer and head."""
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def entry_bytes(self) -> int:
        """Keys and values of an entry of one row, in all layers and heads."""
        return self.num_layers * self.num_kv_heads * self.head_bytes

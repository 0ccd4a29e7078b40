"""Pages of a text, of which a query reads a few: bounds of their keys are at hand, pages may lie elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, Blocks, allotted_blocks, positions_bytes

__all__ = ["Pages", "pages_bytes"]


def pages_bytes(
    page_entries: int,
    *,
    longest_row_entries: int,
    num_layers: int,
    num_rows: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """What the tensors of `Pages` must measure."""
    page = num_kv_heads * 2 * (page_entries + 1) * head_dim * dtype.itemsize
    page += positions_bytes(page_entries, num_kv_heads, is_span=True)
    return num_layers * num_rows * (allotted_blocks(longest_row_entries // page_entries) * page + 8)


class Pages(Blocks):
    """Raw entries by pages, with the least and the largest of each channel of their keys.

    Args:
        page_entries: of a page.
        in_host_memory: pages lie there, wherever the model is; bounds and positions are with the model.
    """

    def __init__(
        self,
        page_entries: int,
        *,
        in_host_memory: bool,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
    ) -> None:
        shapes = {
            "keys": ((num_kv_heads, page_entries, head_dim), dtype),
            "values": ((num_kv_heads, page_entries, head_dim), dtype),
            "bounds": ((2, num_kv_heads, head_dim), dtype),
        }
        devices = [device] * num_layers if isinstance(device, torch.device) else device
        super().__init__(
            page_entries, shapes, is_span=True, num_rows=num_rows, num_kv_heads=num_kv_heads, devices=devices
        )
        if in_host_memory:
            self.to_host(("keys", "values"))

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        bounds = torch.stack([keys.amin(dim=1), keys.amax(dim=1)])
        self.put(layer, row, positions, {"keys": keys, "values": values, "bounds": bounds})

    def blocks(self, layer: int) -> BlockEntries:
        keys, values, positions = self.held["keys"][layer], self.held["values"][layer], self.positions(layer)
        return keys.to(positions.device), values.to(positions.device), positions

    def scores(
        self, layer: int, queries: Float[Tensor, "rows kv_heads groups seq head_dim"]
    ) -> Float[Tensor, "rows kv_heads seq pages"]:
        """The largest product that a query of a key head's could have with a key of each page (Quest, equation 2)."""
        # By row, head, group (of one), channel and page.
        least, largest = self.held["bounds"][layer].permute(2, 0, 3, 4, 1).unsqueeze(3)
        return (queries.clamp(min=0) @ largest + queries.clamp(max=0) @ least).amax(dim=2)

    def some(self, layer: int, pages: Int[Tensor, "rows kv_heads chosen"]) -> BlockEntries:
        """Keys, values and positions of some pages of each head."""
        row, head = torch.arange(pages.shape[0])[:, None, None], torch.arange(pages.shape[1])[None, :, None]

        def chosen(held: Tensor) -> Tensor:
            index = (part.to(held.device) for part in (row, pages, head))
            return held[tuple(index)].flatten(2, 3).to(pages.device)

        return chosen(self.held["keys"][layer]), chosen(self.held["values"][layer]), chosen(self.positions(layer))

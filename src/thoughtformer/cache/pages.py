"""Pages of a text, of which a query reads a few: bounds of their keys are at hand, pages may lie elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thoughtformer.cache.blocks import BlockEntries, Blocks, allotted_blocks, positions_bytes
from thoughtformer.cache.shape import KVShape

__all__ = ["Pages", "pages_bytes"]


def pages_bytes(page_entries: int, longest_row_entries: int, shape: KVShape) -> int:
    """What the tensors of `Pages` must measure."""
    page = shape.num_kv_heads * (page_entries + 1) * shape.head_bytes
    page += positions_bytes(page_entries, shape.num_kv_heads, is_span=True)
    pages = allotted_blocks(longest_row_entries // page_entries)
    return shape.num_layers * shape.num_rows * (pages * page + 8)


class Pages(Blocks):
    """Raw entries by pages, with the least and the largest of each channel of their keys.

    Args:
        page_entries: of a page.
        shape, devices: as for all blocks.
        in_host_memory: pages lie there, wherever the model is; bounds and positions are with the model.
    """

    def __init__(
        self, page_entries: int, shape: KVShape, devices: Sequence[torch.device], *, in_host_memory: bool
    ) -> None:
        page = (shape.num_kv_heads, page_entries, shape.head_dim)
        contents = {
            "keys": (page, shape.dtype),
            "values": (page, shape.dtype),
            "bounds": ((2, shape.num_kv_heads, shape.head_dim), shape.dtype),
        }
        super().__init__(page_entries, contents, shape, devices, is_span=True)
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

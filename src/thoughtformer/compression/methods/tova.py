"""TOVA (Oren et al., arXiv 2401.06104): what the last token attends to least makes room."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thoughtformer.checks import check_count
from thoughtformer.compression.one_by_one import OneByOne

__all__ = ["TOVA"]


@dataclass(frozen=True, kw_only=True)
class TOVA(OneByOne):
    """Holds `max_entries` a layer; when full, the token that the last query attended to least makes room, itself too.

    Attention is averaged over the heads of a layer (section 4), which therefore hold the same tokens.
    """

    name = "tova"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_entries", self.max_entries, 2)

    def weighed(self, before: Tensor, weights: Tensor) -> Tensor:
        return weights.mean(dim=(1, 2))[:, None].expand_as(before)

"""What measures: speed, memory, FLOPs."""

from __future__ import annotations

from thoughtformer.bench.compare import Comparison, compare, split_prompt
from thoughtformer.bench.flops import CountedFlops, count_flops, generation_flops, regular_ids

__all__ = [
    "Comparison",
    "CountedFlops",
    "compare",
    "count_flops",
    "generation_flops",
    "regular_ids",
    "split_prompt",
]

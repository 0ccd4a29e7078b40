"""Repeated runs of several peers, interleaved, and the machine's own limit beside them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from thoughtformer.bench.records import Spread

__all__ = ["interleaved", "memory_read_rate", "seconds_of"]

#: One run of a peer: figures by name.
Run = Callable[[], dict[str, float]]


def interleaved(
    runs: Mapping[str, Run],
    *,
    repeats: int,
    warmups: int = 1,
    on_run: Callable[[str, int], None] | None = None,
) -> dict[str, dict[str, Spread]]:
    """Each peer's figures over `repeats` rounds, in every other round backwards, after `warmups` that don't count.

    Whatever else the machine does then falls on all peers alike.
    """
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for number in range(-warmups, repeats):
        order = list(runs)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            gc.collect()
            if on_run is not None:
                on_run(name, number)
            for metric, value in runs[name]().items():
                if number >= 0:
                    figures[name].setdefault(metric, []).append(value)
    return {name: {metric: Spread.of(values) for metric, values in of.items()} for name, of in figures.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """How long `work` takes; a GPU is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def memory_read_rate(*, mebibytes: int = 512, repeats: int = 5) -> float:
    """Bytes a second that torch's threads read from memory: the better of a sum and a maximum, far past the caches.

    What decoding one row can't exceed: each token reads every weight once.
    """
    buffer = torch.rand(mebibytes << 18)
    best = 0.0
    for work in (buffer.sum, buffer.max):
        work()
        times = [seconds_of(work) for _ in range(repeats)]
        best = max(best, buffer.nbytes / sorted(times)[len(times) // 2])
    return best

"""Pictures of the results; series are told apart by shape as well as by colour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.report.canvas import MARKERS, new_axes, save
from benchmarks.report.claims import latest
from benchmarks.report.study_plots import draw_study
from thoughtformer.bench.records import Record, Spread

__all__ = ["draw_all"]


def _lines(axes: Any, series: dict[str, list[tuple[float, Spread]]]) -> None:
    for marker, (name, points) in zip(cycle(MARKERS), series.items()):
        points = sorted(points, key=lambda point: point[0])
        middle = [spread.median for _, spread in points]
        below = [spread.median - spread.low for _, spread in points]
        above = [spread.high - spread.median for _, spread in points]
        axes.errorbar([x for x, _ in points], middle, yerr=[below, above], marker=marker, capsize=2, label=name)
    axes.legend(fontsize=8)


def _series(records: Sequence[Record], metric: str, across: str) -> dict[str, list[tuple[float, Spread]]]:
    """The last figure of each peer and place."""
    found: dict[str, dict[float, Spread]] = {}
    for record in records:
        if metric in record.metrics:
            found.setdefault(record.peer, {})[record.workload[across]] = record.metrics[metric]
    return {peer: list(points.items()) for peer, points in found.items()}


def _curve(records: Sequence[Record], metric: str, path: Path, title: str, across: str, up: str) -> Path | None:
    series = _series(records, metric, "context")
    if not series:
        return None
    figure, axes = new_axes(across, up, title)
    _lines(axes, series)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{int(tick):,}" for tick in ticks])
    return save(figure, path)


def _batch1(records: Sequence[Record], path: Path) -> Path | None:
    last = {record.peer: record for record in records if record.metrics}
    memory = last.pop("memory", None)
    if not last:
        return None
    figure, axes = new_axes("tokens a second", "", "one row, short context")
    names = list(last)
    speeds = [last[name].metrics["tokens_per_second"] for name in names]
    middle = [speed.median for speed in speeds]
    spread = [[speed.median - speed.low for speed in speeds], [speed.high - speed.median for speed in speeds]]
    axes.barh(names, middle, xerr=spread, capsize=3, color="#5b8db8")
    axes.invert_yaxis()
    if memory is not None:
        limit = memory.metrics["bytes_per_second"].median / last[names[0]].workload["weight_bytes"]
        axes.axvline(limit, color="black", linestyle="--", label="memory read rate by weight bytes")
        axes.legend(fontsize=8, loc="lower right")
    return save(figure, path)


def _flops(records: Sequence[Record], path: Path) -> Path | None:
    pairs = list(dict.fromkeys((record.workload["prompt"], record.workload["new"]) for record in records))
    peers = list(dict.fromkeys(record.peer for record in records))
    if not pairs:
        return None
    figure, axes = new_axes("prompt + new tokens", "TFLOPs", "FLOPs of a request")
    width = 0.8 / len(peers)
    for number, peer in enumerate(peers):
        values = {
            (record.workload["prompt"], record.workload["new"]): record.metrics["flops"].median / 1e12
            for record in records
            if record.peer == peer
        }
        places = [place + (number - (len(peers) - 1) / 2) * width for place in range(len(pairs))]
        axes.bar(places, [values.get(pair, 0) for pair in pairs], width, label=peer, hatch=("", "//", "..")[number % 3])
    axes.set_yscale("log")
    axes.set_xticks(range(len(pairs)), [f"{prompt} + {new}" for prompt, new in pairs])
    axes.legend(fontsize=8)
    return save(figure, path)


def _pareto(records: Sequence[Record], path: Path, text: str) -> Path | None:
    """What compression costs against bytes held, and the methods that no other beats in both."""
    last = {(record.peer, record.workload["removed"]): record for record in records if record.metrics}
    if not last:
        return None
    figure, axes = new_axes(
        "mean bytes of keys and values", "bits per byte above full attention", f"quality against bytes held, {text}"
    )
    places = {
        key: (record.metrics["kv_bytes"].median, record.metrics["above_full_bits_per_byte"].median)
        for key, record in last.items()
    }
    peers = list(dict.fromkeys(peer for peer, _ in last))
    for marker, peer in zip(cycle(MARKERS), peers):
        points = sorted(place for (name, _), place in places.items() if name == peer)
        style = {"linestyle": "--" if peer.startswith("kvpress") else "-", "linewidth": 1}
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, markersize=5, label=peer, **style)
    # Methods hold equal bytes to within a per cent or two: what differs by less counts as the same.
    front, best = [], float("inf")
    for x, y in sorted(places.values(), key=lambda place: (float(f"{place[0]:.1e}"), place[1])):
        if y < best:
            front.append((x, y))
            best = y
    axes.plot([x for x, _ in front], [y for _, y in front], color="black", alpha=0.25, linewidth=6, label="front")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.001)
    axes.legend(fontsize=7, ncols=2)
    return save(figure, path)


def draw_all(records: Sequence[Record], folder: Path) -> list[tuple[str, Path]]:
    """Every picture that the records suffice for: (caption, file)."""

    records = latest(records)

    def of(theme: str, case: str, size: bool = True) -> list[Record]:
        chosen = [record for record in records if (record.theme, record.case) == (theme, case)]
        full = [record for record in chosen if record.workload.get("size") == "full"]
        return full if size and full else chosen

    shape = [record for record in of("memory", "kv_bytes") if record.workload["layers"] in (12, 3)]
    drawn = [
        (
            "Time to read a prompt",
            _curve(of("speed", "prefill"), "seconds", folder / "prefill.png", "prefill", "prompt tokens", "seconds"),
        ),
        (
            "Decoding a batch that holds long contexts",
            _curve(
                of("speed", "decode"),
                "tokens_per_second",
                folder / "decode.png",
                "decoding a batch",
                "tokens of context in each row",
                "tokens a second, all rows",
            ),
        ),
        (
            "Bytes of keys and values of one row",
            _curve(shape, "bytes", folder / "kv_bytes.png", "cache of one row", "tokens of context", "bytes"),
        ),
        ("Decoding one row, beside what memory allows", _batch1(of("speed", "batch1"), folder / "batch1.png")),
        ("FLOPs by pair", _flops(of("flops", "pairs"), folder / "flops.png")),
    ]
    drawn += draw_study(records, folder)
    compression = of("quality", "compression", size=False)
    for number, data in enumerate(dict.fromkeys(tuple(record.workload["data"]) for record in compression)):
        part = [record for record in compression if tuple(record.workload["data"]) == data]
        name = ", ".join(data)
        drawn.append((f"Quality against bytes, {name}", _pareto(part, folder / f"pareto_{number}.png", name)))
    return [(caption, path) for caption, path in drawn if path is not None]

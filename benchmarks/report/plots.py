"""Pictures of the results; series are told apart by shape as well as by colour, and named where they end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.report.canvas import MARKERS, label_ends, new_axes, plain_ticks, reference_colour, save
from benchmarks.report.claims import latest
from benchmarks.report.study_plots import pictures_of_study
from thoughtformer.bench.records import Record, Spread

__all__ = ["draw_all"]

#: What others are compared with: drawn above them, in the colour of the writing.
REFERENCE = "gpt"


def _where(records: Sequence[Record], what: str) -> str:
    """The line under a title: shapes, the machine, and what bars are."""
    first = records[0]
    shape = "12 layers, d 768, random weights" if first.workload.get("size") == "full" else "a toy size, to see it run"
    threads, processor = first.environment.get("threads", "?"), first.environment.get("processor", "an unknown CPU")
    return f"{shape}; {what}; {processor}, {threads} threads; medians and the range of all runs"


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value / 1e3:g} kB"


def _decades(lowest: float, highest: float, steps: Sequence[int] = (1, 3)) -> list[float]:
    """Round numbers from below the lowest to above the highest."""
    found = [step * 10.0**power for power in range(-9, 13) for step in steps]
    first = max([place for place, value in enumerate(found) if value <= lowest], default=0)
    return [
        value
        for place, value in enumerate(found)
        if place >= first and (value <= highest or found[place - 1] < highest)
    ]


def _curve(
    records: Sequence[Record], metric: str, title: str, across: str, up: str, shown: Callable[[float], str], what: str
) -> Any:
    """A line for each peer over the length of the context, both on logarithmic scales."""
    series: dict[str, dict[float, Spread]] = {}
    for record in records:
        if metric in record.metrics:
            series.setdefault(record.peer, {})[record.workload["context"]] = record.metrics[metric]
    figure, axes = new_axes(across, up, title, _where(records, what))
    ends, markers = [], cycle(MARKERS)
    for name, of in series.items():
        places = sorted(of)
        spreads = [of[place] for place in places]
        middle = [spread.median for spread in spreads]
        below = [spread.median - spread.low for spread in spreads]
        above = [spread.high - spread.median for spread in spreads]
        style = {"color": reference_colour(), "zorder": 5} if name == REFERENCE else {}
        drawn = axes.errorbar(places, middle, yerr=[below, above], marker=next(markers), capsize=2, label=name, **style)
        ends.append((name, places[-1], middle[-1], drawn[0].get_color()))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_ticks(axes.xaxis, sorted({place for of in series.values() for place in of}), "{:,.0f}".format)
    all_of = [spread for of in series.values() for spread in of.values()]
    plain_ticks(axes.yaxis, _decades(min(s.low for s in all_of), max(s.high for s in all_of)), shown)
    label_ends(axes, ends)
    return figure


def _batch1(records: Sequence[Record]) -> Any:
    """A bar for each peer, the plain GPT above, and what the memory's rate allows."""
    last = {record.peer: record for record in records if record.metrics}
    memory = last.pop("memory", None)
    figure, axes = new_axes(
        "tokens a second",
        "",
        "Writing one text: tokens a second",
        _where(records, "32 tokens read, 64 written"),
        height=3.8,
    )
    names = list(last)
    speeds = [last[name].metrics["tokens_per_second"] for name in names]
    middle = [speed.median for speed in speeds]
    spread = [[speed.median - speed.low for speed in speeds], [speed.high - speed.median for speed in speeds]]
    colours = [reference_colour() if name.startswith(REFERENCE + ",") or name == REFERENCE else "C0" for name in names]
    axes.barh(names, middle, xerr=spread, capsize=3, color=colours, height=0.65, ecolor="C1")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    for place, speed in enumerate(speeds):
        axes.annotate(
            f"{speed.median:.0f}",
            (0, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            color=axes.get_facecolor(),
        )
    if memory is not None:
        limit = memory.metrics["bytes_per_second"].median / last[names[0]].workload["weight_bytes"]
        axes.axvline(limit, color="C1", linestyle="--")
        axes.annotate(
            "the memory's rate by the weights' bytes",
            (limit, -0.75),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color="C1",
            fontsize=9,
        )
        axes.set_ylim(len(names) - 0.5, -1.1)
    return figure


def _flops(records: Sequence[Record]) -> Any:
    """A row for each pair of lengths, a mark for each peer."""
    pairs = list(dict.fromkeys((record.workload["prompt"], record.workload["new"]) for record in records))
    figure, axes = new_axes(
        "FLOPs of the request",
        "",
        "What a request costs to compute, by tokens read + written",
        "counted, not timed; 24 layers",
        height=3.8,
    )
    names = list(dict.fromkeys(record.peer for record in records))
    for marker, name in zip(cycle(MARKERS), sorted(names, key=lambda name: name != REFERENCE)):
        values = {
            (record.workload["prompt"], record.workload["new"]): record.metrics["flops"].median
            for record in records
            if record.peer == name
        }
        style = {"color": reference_colour()} if name == REFERENCE else {}
        (drawn,) = axes.plot(
            list(values.values()), [pairs.index(pair) for pair in values], marker, markersize=8, alpha=0.85, **style
        )
        is_least = values[pairs[0]] == min(of.metrics["flops"].median for of in records)
        axes.annotate(
            name,
            (values[pairs[0]], 0),
            (-8 if is_least else 8, 0),
            textcoords="offset points",
            ha="right" if is_least else "left",
            va="center",
            color=drawn.get_color(),
            fontsize=9,
        )
    axes.set_xscale("log")
    lowest, highest = (pick(record.metrics["flops"].median for record in records) for pick in (min, max))
    plain_ticks(
        axes.xaxis,
        _decades(lowest, highest),
        lambda value: f"{value / 1e12:g} T" if value >= 1e11 else f"{value / 1e9:g} G",
    )
    plain_ticks(axes.yaxis, range(len(pairs)))
    axes.set_yticks(range(len(pairs)), [f"{prompt} + {new}" for prompt, new in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(lowest / 4, highest * 2)
    return figure


def _pareto(records: Sequence[Record], text: str) -> Any:
    """What compression costs against bytes held, and the methods that no other beats in both."""
    last = {(record.peer, record.workload["removed"]): record for record in records if record.metrics}
    work = records[0].workload
    figure, axes = new_axes(
        "keys and values held, mean bytes: fewer to the right",
        "bits per byte above full attention",
        f"What compression costs, {text.removesuffix('.txt.xz')}",
        f"{work['model']}, {work['context']:,} tokens of context, {work['blocks']} blocks of each of "
        f"{len(work['seeds'])} seeds; dashed: kvpress",
        height=5.4,
    )
    places = {
        key: (record.metrics["kv_bytes"].median, record.metrics["above_full_bits_per_byte"].median)
        for key, record in last.items()
    }
    # Methods hold equal bytes to within a per cent or two: what differs by less counts as the same.
    front, best = [], float("inf")
    for x, y in sorted(places.values(), key=lambda place: (float(f"{place[0]:.1e}"), place[1])):
        if y < best:
            front.append((x, y))
            best = y
    axes.plot([x for x, _ in front], [y for _, y in front], color=reference_colour(), alpha=0.15, linewidth=9)
    ends = []
    for marker, peer in zip(cycle(MARKERS), dict.fromkeys(peer for peer, _ in last)):
        points = sorted(place for (name, _), place in places.items() if name == peer)
        style: dict[str, Any] = {"linestyle": "--" if peer.startswith("kvpress") else "-", "linewidth": 1.1}
        if peer == "full":
            style |= {"color": reference_colour(), "zorder": 5, "markersize": 8}
        (drawn,) = axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=peer, **style)
        if peer not in ("full", "kvpress none"):
            ends.append((peer, *points[0], drawn.get_color()))
    axes.axhline(0, color=reference_colour(), linewidth=1)
    axes.annotate(
        "full attention", (0.0, 0), (6, 5), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9
    )
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_yscale("symlog", linthresh=0.001)
    values = [y for _, y in places.values()]
    axes.set_ylim(min(-0.0005, 1.7 * min(values)), 1.6 * max(values))
    plain_ticks(axes.yaxis, [tick for tick in (0, 0.001, 0.01, 0.1, 1) if tick <= max(values)])
    sizes = [x for x, _ in places.values()]
    plain_ticks(axes.xaxis, _decades(min(sizes), max(sizes), (1, 2, 5)), _bytes)
    label_ends(axes, ends)
    return figure


def _by_bytes(records: Sequence[Record]) -> Any:
    """Bits above full attention, and facts recalled, against what of the cache is in memory."""
    work = records[0].workload
    texts = max(record.metrics["above_full_bits_per_byte"].runs for record in records)
    figure, axes = new_axes(
        ("bytes in memory, of those of full attention",) * 2,
        ("bits per byte above full attention", "planted facts, of those that full attention finds"),
        f"What compression costs {work['model']}, {work['tokens']:,} tokens",
        f"the whole cache counted, 2 bytes a number = 1; {texts} texts at most; bars: one standard error",
        height=5.4,
    )
    families: dict[str, list[Record]] = {}
    for record in records:
        families.setdefault(re.sub(r" (1/\d|[01](\.\d+)?)(?=,|$)", "", record.peer), []).append(record)
    for marker, (family, of) in zip(cycle(MARKERS), families.items()):
        of.sort(key=lambda record: record.metrics["resident_of_full"].median)
        style: dict[str, Any] = {"marker": marker, "linestyle": "--" if family.startswith("kvpress") else "-"}
        style |= {"linewidth": 1.1, "label": family}
        if family == "full":
            style |= {"color": reference_colour(), "zorder": 5}
        for part, metric in zip(axes, ("above_full_bits_per_byte", "planted_fact_of_full"), strict=True):
            points = [record for record in of if metric in record.metrics]
            spreads = [record.metrics[metric] for record in points]
            sizes = [record.metrics["resident_of_full"].median for record in points]
            errors = [spread.high - spread.median for spread in spreads]
            part.errorbar(sizes, [spread.median for spread in spreads], yerr=errors, capsize=2, elinewidth=0.6, **style)
    for part in axes:
        part.set_xscale("log")
        part.invert_xaxis()
        plain_ticks(part.xaxis, (1.5, 1, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1))
    axes[0].set_yscale("symlog", linthresh=0.001)
    plain_ticks(axes[0].yaxis, (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1))
    highest = max(record.metrics["above_full_bits_per_byte"].median for record in records)
    axes[0].set_ylim(-0.001, 1.6 * max(highest, 0.01))
    axes[1].set_ylim(-0.05, 1.05)
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def draw_all(records: Sequence[Record], folder: Path) -> list[tuple[str, list[Path]]]:
    """Every picture that the records suffice for: (caption, a file for each theme)."""

    records = latest(records)

    def of(theme: str, case: str, size: bool = True) -> list[Record]:
        chosen = [record for record in records if (record.theme, record.case) == (theme, case)]
        full = [record for record in chosen if record.workload.get("size") == "full"]
        return full if size and full else chosen

    pictures: list[tuple[str, str, Sequence[Record], Callable[[Sequence[Record]], Any]]] = [
        (
            "Time to read a prompt",
            "prefill",
            of("speed", "prefill"),
            partial(
                _curve,
                metric="seconds",
                title="Reading a prompt: seconds to the first token",
                across="tokens of the prompt",
                up="",
                shown=_seconds,
                what="one prompt",
            ),
        ),
        (
            "Decoding a batch that holds long contexts",
            "decode",
            of("speed", "decode"),
            partial(
                _curve,
                metric="tokens_per_second",
                title="Writing 16 texts behind long contexts: tokens a second",
                across="tokens of context in each row",
                up="",
                shown="{:,g}".format,
                what="16 rows",
            ),
        ),
        (
            "Bytes of keys and values of one row",
            "kv_bytes",
            [record for record in of("memory", "kv_bytes") if record.workload["layers"] in (12, 3)],
            partial(
                _curve,
                metric="bytes",
                title="Keys and values that one text needs",
                across="tokens of context",
                up="",
                shown=_bytes,
                what="float32, counted and held against a formula",
            ),
        ),
        ("Decoding one row, beside what memory allows", "batch1", of("speed", "batch1"), _batch1),
        ("FLOPs by pair", "flops", of("flops", "pairs"), _flops),
    ]
    compression = of("quality", "compression", size=False)
    for number, data in enumerate(dict.fromkeys(tuple(record.workload["data"]) for record in compression)):
        part = [record for record in compression if tuple(record.workload["data"]) == data]
        name = ", ".join(data)
        pictures.append((f"Quality against bytes, {name}", f"pareto_{number}", part, partial(_pareto, text=name)))
    by_bytes = [record for record in of("quality", "at_bytes", size=False) if "resident_of_full" in record.metrics]
    for tokens in sorted({record.workload["tokens"] for record in by_bytes}):
        part = [record for record in by_bytes if record.workload["tokens"] == tokens]
        pictures.append((f"Quality by bytes, {tokens:,} tokens", f"by_bytes_{tokens}", part, _by_bytes))
    drawn = [
        (caption, save(partial(draw, of_case), folder / name))
        for caption, name, of_case, draw in pictures
        if any(record.metrics for record in of_case)
    ]
    return drawn + [(caption, save(draw, folder / name)) for caption, name, draw in pictures_of_study(records)]

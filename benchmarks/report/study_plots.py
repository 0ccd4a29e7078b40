"""Pictures of a study: what architectures cost and reach, how that grows, and where context helps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from benchmarks.report.canvas import MARKERS, new_axes, save
from benchmarks.report.study_tables import Trained, of_shared_seeds, texts_of, trained
from thoughtformer.bench.records import Record
from thoughtformer.evaluate.profile import BINS

__all__ = ["draw_study"]

#: Architectures whose profiles are drawn.
PROFILED = (
    "gpt-ends",
    "fast-2-4",
    "hybrid-rebuild",
    "hourglass-2-2-2",
    "hourglass-k2-rebuild",
    "hourglass-rebuild-recent-8",
)


def draw_study(records: Sequence[Record], folder: Path) -> list[tuple[str, Path | None]]:
    """The pictures of a study's rows: (caption, file, or None where the rows don't suffice)."""
    rows = [record for record in records if (record.theme, record.case) == ("study", "train")]
    if not rows:
        return []
    setting = _commonest(rows)
    alike = trained(rows, *setting)
    return [
        ("Architectures at equal text", _costs(alike, folder / "study.png", _title(setting))),
        ("Bits per byte by size and by text", _growth(rows, setting, folder / "study_growth.png")),
        (
            "Where context helps: by a token's place in its sentence",
            _profile(alike, setting, "by_offset", folder / "study_offset.png", "tokens before it in its sentence"),
        ),
        (
            "Where context helps: by earlier sentences",
            _profile(
                alike,
                setting,
                "by_earlier",
                folder / "study_earlier.png",
                "earlier sentences in view, the start of the text among them",
            ),
        ),
    ]


def _family(row: Trained) -> str:
    """What an architecture is a variant of."""
    return row.name if row.name.startswith("gpt") else row.name.split("-")[0]


def _setting(record: Record) -> tuple[str, str, str]:
    """What rows must share to be compared: size, megabytes and learning rate."""
    work = record.workload
    return work["size"], str(work["megabytes"]), str(work["learning_rate"])


def _commonest(rows: Sequence[Record]) -> tuple[str, str, str]:
    """The setting that most rows were trained in."""
    return Counter(_setting(row) for row in rows).most_common(1)[0][0]


def _title(setting: tuple[str, str, str]) -> str:
    size, megabytes, rate = setting
    return f"{size}, {megabytes} MB, rate {float(rate):g}"


def _bits_label(rows: Sequence[Trained]) -> str:
    return "bits per byte, mean of " + ", ".join(texts_of([record for row in rows for record in row.rows]))


def _costs(rows: Sequence[Trained], path: Path, title: str) -> Path:
    """Bits per byte against what training and what writing cost; every seed is a point."""
    costs = {
        "training TFLOPs": (1e12, lambda row: row.mean("training_flops")),
        "MFLOPs a written text token": (1e6, lambda row: row.text_flops or float("nan")),
    }
    figure, parts = new_axes(tuple(costs), _bits_label(rows), title)
    families = list(dict.fromkeys(map(_family, rows)))
    for axes, (unit, cost) in zip(parts, costs.values(), strict=True):
        for marker, family in zip(cycle(MARKERS), families):
            of = [row for row in rows if _family(row) == family]
            points = [(cost(row) / unit, bits) for row in of for bits in row.by_seed().values()]
            axes.plot([x for x, _ in points], [y for _, y in points], marker, label=family, alpha=0.7)
    parts[0].legend(fontsize=8)
    return save(figure, path)


def _growth(rows: Sequence[Record], setting: tuple[str, str, str], path: Path) -> Path | None:
    """Bits per byte by parameters at equal text, and by text at equal size, of those seen at two places or more."""
    size, megabytes, rate = setting
    same_rate = [row for row in rows if str(row.workload["learning_rate"]) == rate]
    by_size = _places([row for row in same_rate if str(row.workload["megabytes"]) == megabytes], "size")
    by_text = _places([row for row in same_rate if row.workload["size"] == size], "megabytes")
    panels = [
        (f"parameters, millions ({megabytes} MB of text)", by_size, _millions),
        (f"text, MB (size {size})", by_text, _megabytes),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    names = list(dict.fromkeys(name for _, places, _ in panels for name in places))
    of_all = [place for _, places, _ in panels for of in places.values() for place in of]
    figure, parts = new_axes(tuple(across for across, _, _ in panels), _bits_label(of_all), f"rate {float(rate):g}")
    for axes, (_, places, x_of) in zip(parts, panels, strict=True):
        for marker, name in zip(cycle(MARKERS), names):
            _draw_places(axes, sorted(places.get(name, []), key=x_of), x_of, marker, name)
        axes.set_xscale("log")
        # One tick a place: architectures differ there by a few parameters.
        ticks = sorted(round(min(map(x_of, of)), 1) for of in _by_place(places).values())
        are_close = any(after < 1.15 * before for before, after in pairwise(ticks))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=60 if are_close else 0)
        axes.set_xticks([], minor=True)
    parts[0].legend(fontsize=8)
    return save(figure, path)


def _places(rows: Sequence[Record], key: str) -> dict[str, list[Trained]]:
    """Each architecture's rows by place, of architectures with more than one."""
    found: dict[str, dict[Any, list[Record]]] = {}
    for row in rows:
        found.setdefault(row.peer, {}).setdefault(row.workload[key], []).append(row)
    return {
        name: [Trained(name=name, rows=tuple(of)) for of in places.values()]
        for name, places in found.items()
        if len(places) > 1
    }


def _by_place(places: dict[str, list[Trained]]) -> dict[tuple[str, int], list[Trained]]:
    """All architectures' rows of each size and amount of text."""
    found: dict[tuple[str, int], list[Trained]] = {}
    for row in (row for of in places.values() for row in of):
        work = row.rows[0].workload
        found.setdefault((work["size"], work["megabytes"]), []).append(row)
    return found


def _millions(row: Trained) -> float:
    return row.mean("parameters") / 1e6


def _megabytes(row: Trained) -> float:
    return row.rows[0].workload["megabytes"]


def _draw_places(axes: Any, rows: Sequence[Trained], x_of: Any, marker: str, name: str) -> None:
    """A line through the means over seeds, with the smallest and largest."""
    middle = [row.mean_bits for row in rows]
    below = [mean - min(row.by_seed().values()) for mean, row in zip(middle, rows, strict=True)]
    above = [max(row.by_seed().values()) - mean for mean, row in zip(middle, rows, strict=True)]
    axes.errorbar([x_of(row) for row in rows], middle, yerr=[below, above], marker=marker, capsize=2, label=name)


def _profile(rows: Sequence[Trained], setting: tuple[str, str, str], kind: str, path: Path, across: str) -> Path | None:
    """Bits a token less the plain GPT's, by bin, over the seeds that all of them have."""
    named = [row for row in rows if row.name in ("gpt", *PROFILED)]
    if len(named) < 2 or all(row.name != "gpt" for row in named):
        return None
    shared = of_shared_seeds(named)
    text = texts_of([record for row in shared.values() for record in row.rows])[0]
    figure, axes = new_axes(across, "bits", f"bits a token beside the plain GPT, {text}, {_title(setting)}")
    base = shared["gpt"].profile(text, kind)
    for marker, name in zip(cycle(MARKERS), (name for name in PROFILED if name in shared)):
        values = shared[name].profile(text, kind)
        points = [
            (place, a - b)
            for place, (a, b) in enumerate(zip(values, base, strict=True))
            if a is not None and b is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=name)
    axes.axhline(0, color="black", linewidth=1)
    # By earlier sentences the first bin is empty: a document's start counts as one.
    filled = [place for place, value in enumerate(base) if value is not None]
    axes.set_xticks(filled, [BINS[place] for place in filled])
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return save(figure, path)

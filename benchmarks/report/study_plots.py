"""Pictures of a study: what architectures cost and reach, how that grows, and where context helps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, cycle, pairwise
from typing import Any

from benchmarks.report.canvas import MARKERS, label_ends, new_axes, plain_ticks, reference_colour
from benchmarks.report.study_tables import Trained, of_shared_seeds, texts_of, trained
from thoughtformer.bench.records import Record
from thoughtformer.evaluate.profile import BINS

__all__ = ["pictures_of_study"]

#: Architectures whose profiles are drawn.
PROFILED = (
    "gpt-ends",
    "fast-2-4",
    "hybrid-rebuild",
    "hourglass-2-2-2",
    "hourglass-k2-rebuild",
    "hourglass-rebuild-recent-8",
)


def pictures_of_study(records: Sequence[Record]) -> list[tuple[str, str, Callable[[], Any]]]:
    """The pictures that a study's rows suffice for: (caption, name, what draws it)."""
    rows = [record for record in records if (record.theme, record.case) == ("study", "train")]
    if not rows:
        return []
    setting = _commonest(rows)
    alike = trained(rows, *setting)
    pictures = [("Architectures at equal text", "study", partial(_costs, alike, _title(setting)))]
    panels = _growing(rows, setting)
    if panels:
        pictures.append(("Bits per byte by size and by text", "study_growth", partial(_growth, panels, setting)))
    named = [row for row in alike if row.name in ("gpt", *PROFILED)]
    if len(named) > 1 and any(row.name == "gpt" for row in named):
        for kind, name, where, across in (
            ("by_offset", "study_offset", "a token's place in its sentence", "tokens before it in its sentence"),
            (
                "by_earlier",
                "study_earlier",
                "earlier sentences",
                "earlier sentences in view, the start of the text among them",
            ),
        ):
            draw = partial(_profile, of_shared_seeds(named), setting, kind, where, across)
            pictures.append((f"Where context helps: by {where}", name, draw))
    return pictures


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
    return f"size {size}, {megabytes} MB of text, learning rate {float(rate):g}"


def _bits_label(rows: Sequence[Trained]) -> str:
    return "bits per byte, mean of " + ", ".join(texts_of([record for row in rows for record in row.rows]))


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Marker and colour of each name, the plain GPT in that of the writing."""
    colours = (f"C{number % 8}" for number in count())
    return {
        name: {"marker": marker, "color": reference_colour() if name == "gpt" else next(colours)}
        for marker, name in zip(cycle(MARKERS), names)
    }


def _costs(rows: Sequence[Trained], setting: str) -> Any:
    """Bits per byte against what training and what writing cost; every seed is a point."""
    costs = {
        "TFLOPs of the training": (1e12, lambda row: row.mean("training_flops")),
        "MFLOPs a written token of text": (1e6, lambda row: row.text_flops or float("nan")),
    }
    title = "Architectures of equal size, by what they cost and reach"
    figure, parts = new_axes(tuple(costs), _bits_label(rows), title, f"{setting}; every seed is a point")
    styles, ends = _styles(list(dict.fromkeys(map(_family, rows)))), []
    for axes, (unit, cost) in zip(parts, costs.values(), strict=True):
        ends.clear()
        for family, style in styles.items():
            of = [row for row in rows if _family(row) == family]
            points = [(cost(row) / unit, bits) for row in of for bits in row.by_seed().values()]
            axes.plot([x for x, _ in points], [y for _, y in points], linestyle="", label=family, alpha=0.75, **style)
            ends.append((family, *max(points), style["color"]))
    label_ends(parts[-1], ends)
    return figure


def _growing(rows: Sequence[Record], setting: tuple[str, str, str]) -> list[tuple[str, dict[str, list[Trained]], Any]]:
    """What is seen at two sizes or more, and with two amounts of text: (what goes across, rows, their place)."""
    size, megabytes, rate = setting
    same_rate = [row for row in rows if str(row.workload["learning_rate"]) == rate]
    by_size = _places([row for row in same_rate if str(row.workload["megabytes"]) == megabytes], "size")
    by_text = _places([row for row in same_rate if row.workload["size"] == size], "megabytes")
    panels = [
        (f"parameters, millions ({megabytes} MB of text)", by_size, _millions),
        (f"text, MB (size {size})", by_text, _megabytes),
    ]
    return [panel for panel in panels if panel[1]]


def _growth(panels: Sequence[tuple[str, dict[str, list[Trained]], Any]], setting: tuple[str, str, str]) -> Any:
    """Bits per byte by parameters at equal text, and by text at equal size."""
    styles = _styles(list(dict.fromkeys(name for _, places, _ in panels for name in places)))
    of_all = [place for _, places, _ in panels for of in places.values() for place in of]
    title = "Bits per byte with more parameters, and with more text"
    under = f"learning rate {float(setting[2]):g}; means over seeds, bars from the best to the worst"
    figure, parts = new_axes(tuple(across for across, _, _ in panels), _bits_label(of_all), title, under)
    for axes, (_, places, x_of) in zip(parts, panels, strict=True):
        ends = []
        for name, style in styles.items():
            of = sorted(places.get(name, []), key=x_of)
            _draw_places(axes, of, x_of, name, style)
            if of:
                ends.append((name, x_of(of[-1]), of[-1].mean_bits, style["color"]))
        axes.set_xscale("log")
        # One tick a place: architectures differ there by a few parameters.
        ticks = sorted(round(min(map(x_of, of)), 1) for of in _by_place(places).values())
        plain_ticks(axes.xaxis, [tick for tick, after in pairwise([*ticks, float("inf")]) if after > 1.15 * tick])
        if axes is parts[-1]:
            label_ends(axes, ends)
    return figure


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


def _draw_places(axes: Any, rows: Sequence[Trained], x_of: Any, name: str, style: dict[str, Any]) -> None:
    """A line through the means over seeds, with the smallest and largest."""
    middle = [row.mean_bits for row in rows]
    below = [mean - min(row.by_seed().values()) for mean, row in zip(middle, rows, strict=True)]
    above = [max(row.by_seed().values()) - mean for mean, row in zip(middle, rows, strict=True)]
    axes.errorbar([x_of(row) for row in rows], middle, yerr=[below, above], capsize=2, label=name, **style)


def _profile(shared: dict[str, Trained], setting: tuple[str, str, str], kind: str, where: str, across: str) -> Any:
    """Bits a token less the plain GPT's, by bin, over the seeds that all of them have."""
    text = texts_of([record for row in shared.values() for record in row.rows])[0]
    title = f"Bits a token beside the plain GPT, by {where}"
    figure, axes = new_axes(across, "bits a token, less is better", title, f"{text}; {_title(setting)}")
    base = shared["gpt"].profile(text, kind)
    styles, ends = _styles(["gpt", *(name for name in PROFILED if name in shared)]), []
    for name, style in styles.items():
        if name == "gpt":
            continue
        values = shared[name].profile(text, kind)
        points = [
            (place, a - b)
            for place, (a, b) in enumerate(zip(values, base, strict=True))
            if a is not None and b is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style)
        ends.append((name, *points[-1], style["color"]))
    axes.axhline(0, color=reference_colour(), linewidth=1.5)
    # By earlier sentences the first bin is empty: a document's start counts as one.
    filled = [place for place, value in enumerate(base) if value is not None]
    axes.set_xticks(filled, [BINS[place] for place in filled])
    label_ends(axes, [*ends, ("gpt", filled[-1], 0, reference_colour())])
    return figure

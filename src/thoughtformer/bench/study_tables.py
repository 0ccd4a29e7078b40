"""Tables of a study's rows: bits per byte at equal text, by architecture, and where context helps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from thoughtformer.bench.records import Record, Spread
from thoughtformer.errors import InputError

__all__ = ["BINS", "STUDY_TEXTS", "Trained", "learning_rates_table", "profile_table", "study_table", "trained"]

#: Of `study.profile.EDGES`.
BINS = ("0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33+")
STUDY_TEXTS = ("books", "wikipedia")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One architecture's rows of equal size, text and learning rate, over seeds."""

    name: str
    rows: tuple[Record, ...]

    def metric(self, name: str) -> Spread:
        return Spread.of([row.metrics[name].median for row in self.rows])

    def mean(self, name: str) -> float:
        return statistics.fmean(row.metrics[name].median for row in self.rows)

    @property
    def both(self) -> float:
        """Mean bits per byte of the two texts."""
        return statistics.fmean(self.mean(f"{text}_bits_per_byte") for text in STUDY_TEXTS)

    def profile(self, text: str, kind: str) -> list[float | None]:
        """Bits a token in each bin, mean over seeds."""
        columns = zip(*(row.settings[text][kind] for row in self.rows), strict=True)
        return [None if None in column else statistics.fmean(column) for column in columns]


def trained(records: Sequence[Record], size: str, megabytes: str, learning_rate: str | None = None) -> list[Trained]:
    """The study's architectures of a size and text; raises `InputError` if there are none."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if (record.theme, record.case) != ("study", "train"):
            continue
        work = record.workload
        if work["size"] != size or work["megabytes"] != int(megabytes):
            continue
        if learning_rate is None or work["learning_rate"] == float(learning_rate):
            found.setdefault(record.peer, []).append(record)
    if not found:
        raise InputError(f"the results hold no study rows of size {size} on {megabytes} MB at rate {learning_rate}.")
    return [Trained(name=name, rows=tuple(rows)) for name, rows in found.items()]


def study_table(
    records: Sequence[Record], size: str, megabytes: str, learning_rate: str, names: str = "", base: str = "gpt"
) -> list[list[str]]:
    """Architectures by mean bits per byte, the best first; `names` picks some."""
    rows = trained(records, size, megabytes, learning_rate)
    reference = next((row for row in rows if row.name == base), None)
    if reference is None:
        raise InputError(f"no rows of {base!r} to compare with.")
    chosen = names.split(",") if names else [row.name for row in rows]
    lines = [["", "books", "Wikipedia", "mean, of GPT's", "parameters", "training TFLOPs", "seeds"]]
    for row in sorted(rows, key=lambda row: row.both):
        if row.name not in chosen:
            continue
        lines.append(
            [
                row.name,
                *(_bits(row, text) for text in STUDY_TEXTS),
                f"{100 * (row.both / reference.both - 1):+.1f}%" if row is not reference else f"{row.both:.4f}",
                f"{row.mean('parameters') / 1e6:.2f}M",
                f"{row.mean('training_flops') / 1e12:.0f}",
                str(len(row.rows)),
            ]
        )
    return lines


def _bits(row: Trained, text: str) -> str:
    spread, mean = row.metric(f"{text}_bits_per_byte"), row.mean(f"{text}_bits_per_byte")
    return f"{mean:.4f}" if spread.low == spread.high else f"{mean:.4f} [{spread.low:.4f}, {spread.high:.4f}]"


def learning_rates_table(records: Sequence[Record], size: str, megabytes: str) -> list[list[str]]:
    """Mean bits per byte of the architectures trained at several rates, seed 0."""
    rates = sorted({record.workload["learning_rate"] for record in records if record.case == "train"})
    by_rate = {rate: {row.name: row for row in trained(records, size, megabytes, str(rate))} for rate in rates}
    names = [name for name in by_rate[rates[0]] if all(name in rows for rows in by_rate.values())]
    lines = [["", *(f"{rate:g}" for rate in rates)]]
    for name in names:
        cells = [_first_seed(by_rate[rate][name]) for rate in rates]
        best = min(cells)
        lines.append([name, *(f"**{cell:.4f}**" if cell == best else f"{cell:.4f}" for cell in cells)])
    return lines


def _first_seed(row: Trained) -> float:
    first = Trained(name=row.name, rows=tuple(record for record in row.rows if record.workload["seed"] == 0))
    return first.both


def profile_table(
    records: Sequence[Record], kind: str, names: str, text: str, size: str, megabytes: str, learning_rate: str
) -> list[list[str]]:
    """Bits a token by bin: the first architecture's, and how much the others' differ."""
    if kind not in ("by_offset", "by_earlier"):
        raise InputError(f"profile {kind!r} is unknown: by_offset or by_earlier.")
    rows = {row.name: row for row in trained(records, size, megabytes, learning_rate)}
    first, *others = names.split(",")
    missing = [name for name in (first, *others) if name not in rows]
    if missing:
        raise InputError(f"no rows of {', '.join(missing)}.")
    base = rows[first].profile(text, kind)
    lines = [["", *BINS], [first, *("" if bits is None else f"{bits:.2f}" for bits in base)]]
    for name in others:
        bits = rows[name].profile(text, kind)
        pairs = zip(bits, base, strict=True)
        lines.append([name, *("" if a is None or b is None else f"{a - b:+.3f}" for a, b in pairs)])
    return lines

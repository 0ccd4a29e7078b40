"""Tables of a study's rows: bits per byte at equal text, what writing costs, and where context helps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.report.claims import latest
from thoughtformer.bench.records import Record, Spread
from thoughtformer.bench.shapes import SENTENCE_TOKENS
from thoughtformer.errors import InputError, nearest
from thoughtformer.evaluate.profile import PROFILES

__all__ = [
    "SUFFIX",
    "Trained",
    "finalists_table",
    "flops_of_text",
    "learning_rates_table",
    "profile_table",
    "study_table",
    "texts_of",
    "trained",
]

SUFFIX = "_bits_per_byte"


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
    def mean_bits(self) -> float:
        """Mean bits per byte of all texts."""
        return statistics.fmean(self.mean(text + SUFFIX) for text in self.texts)

    def by_seed(self) -> dict[int, float]:
        """Mean bits per byte of all texts, of each seed."""
        return {
            row.workload["seed"]: statistics.fmean(row.metrics[text + SUFFIX].median for text in self.texts)
            for row in self.rows
        }

    @property
    def text_flops(self) -> float | None:
        """FLOPs of a written token of text; the sentence ends between are no text, but are paid for.

        They were counted over sentences of `SENTENCE_TOKENS`, and so say nothing of rows with a length of their own.
        """
        recipe = self.rows[0].settings.get("recipe", {})
        if recipe.get("min_sentence_tokens"):
            return None
        has_ends = recipe.get("sentence_ends", False)
        return self.mean("decode_flops") * (SENTENCE_TOKENS / (SENTENCE_TOKENS - 1) if has_ends else 1)

    @property
    def texts(self) -> list[str]:
        """The held-out texts that every row was scored on."""
        return texts_of(self.rows)

    def with_profile(self, text: str, kind: str) -> Trained:
        """The rows that have a profile: those of older versions lack `by_repeat`."""
        rows = tuple(row for row in self.rows if kind in row.settings[text])
        if not rows:
            raise InputError(f"no row of {self.name} has the profile {kind}: they are of an older version.")
        return replace(self, rows=rows)

    def profile(self, text: str, kind: str) -> list[float | None]:
        """Bits a token in each bin, mean over seeds."""
        columns = zip(*(row.settings[text][kind] for row in self.rows), strict=True)
        return [None if None in column else statistics.fmean(column) for column in columns]


def of_shared_seeds(rows: Sequence[Trained]) -> dict[str, Trained]:
    """The architectures by name, with the rows of those seeds alone that all of them have."""
    shared = set.intersection(*({record.workload["seed"] for record in row.rows} for row in rows))
    if not shared:
        raise InputError(f"{', '.join(row.name for row in rows)} have no seed in common.")
    return {
        row.name: Trained(name=row.name, rows=tuple(r for r in row.rows if r.workload["seed"] in shared))
        for row in rows
    }


def texts_of(rows: Sequence[Record]) -> list[str]:
    """The held-out texts that all rows were scored on; raises `InputError` if there is none."""
    texts = [name.removesuffix(SUFFIX) for name in rows[0].metrics if name.endswith(SUFFIX)]
    shared = [text for text in texts if all(text + SUFFIX in row.metrics for row in rows)]
    if not shared:
        raise InputError("the study's rows were scored on different texts: compare what was scored alike.")
    return shared


def trained(records: Sequence[Record], size: str, megabytes: str, learning_rate: str | None = None) -> list[Trained]:
    """The study's architectures of a size and text; raises `InputError` if there are none.

    `megabytes` may name several amounts with commas between: those trained on another than the first say so.
    """
    amounts = [int(amount) for amount in megabytes.split(",")]
    found: dict[str, list[Record]] = {}
    for record in records:
        if (record.theme, record.case) != ("study", "train"):
            continue
        work = record.workload
        if work["size"] != size or work["megabytes"] not in amounts:
            continue
        if learning_rate is None or work["learning_rate"] == float(learning_rate):
            is_other = work["megabytes"] != amounts[0]
            name = f"{record.peer}, {work['megabytes']} MB" if is_other else record.peer
            found.setdefault(name, []).append(record)
    for name, rows in found.items():
        by_rate = [(row.workload["seed"], row.workload["learning_rate"]) for row in rows]
        if len(by_rate) > len(set(by_rate)):
            raise InputError(f"the results hold rows of {name}, {size}, {megabytes} MB that share a seed: drop one.")
    if not found:
        raise InputError(f"the results hold no study rows of size {size} on {megabytes} MB at rate {learning_rate}.")
    return [Trained(name=name, rows=tuple(rows)) for name, rows in found.items()]


def study_table(
    records: Sequence[Record], size: str, megabytes: str, learning_rate: str, names: str = "", base: str = "gpt"
) -> list[list[str]]:
    """Architectures by mean bits per byte, the best first; `names` picks some. For `megabytes` see `trained`.

    What is said beside `base` is of means over all seeds, whichever there are, with the range that the seeds allow. Two
    architectures share nothing by sharing a seed, and one seed of the base may be far off the others.
    """
    rows = trained(records, size, megabytes, learning_rate)
    reference = next((row for row in rows if row.name == base), None)
    if reference is None:
        raise InputError(f"no rows of {base!r} to compare with.")
    chosen = _chosen(rows, names)
    texts = texts_of([record for row in rows for record in row.rows])
    costs = ["parameters", "training TFLOPs", "MFLOPs a text token", "seeds"]
    lines = [["", *texts, f"mean, beside {base}", "perplexity", *costs]]
    for row in sorted(rows, key=lambda row: row.mean_bits):
        if row.name not in chosen:
            continue
        lines.append(
            [
                row.name,
                *(_bits(row, text) for text in texts),
                _beside(row, reference) if row is not reference else f"{row.mean_bits:.4f}",
                _perplexity_beside(row, reference),
                f"{row.mean('parameters') / 1e6:.2f}M",
                f"{row.mean('training_flops') / 1e12:.0f}",
                "" if row.text_flops is None else f"{row.text_flops / 1e6:.1f}",
                str(len(row.rows)),
            ]
        )
    return lines


def finalists_table(
    records: Sequence[Record], size: str, megabytes: str, learning_rate: str, names: str = "", base: str = "gpt"
) -> list[list[str]]:
    """Quality over seeds beside what writing costs the same shape, for architectures that have both.

    For `megabytes` see `trained`; raises `InputError` if decoding wasn't measured at this size.
    """
    rows = trained(records, size, megabytes, learning_rate)
    reference = next((row for row in rows if row.name == base), None)
    measured = [
        record
        for record in latest(records)
        if (record.theme, record.case) == ("speed", "finalists") and record.workload["size"] == size and record.metrics
    ]
    if reference is None or not measured:
        raise InputError(
            f"no rows of {base!r}, or no decoding measured at size {size}: python -m benchmarks.study speed."
        )
    context = measured[-1].workload["context"]
    costs: dict[tuple[str, int], Record] = {
        (record.peer, record.workload["batch"]): record for record in measured if record.workload["context"] == context
    }
    batches = sorted({batch for _, batch in costs})
    trainings = {
        record.peer: record
        for record in latest(records)
        if (record.theme, record.case) == ("speed", "training") and record.workload["size"] == size
    }
    lines = [
        [
            "",
            "bits per byte",
            f"beside {base}",
            "perplexity",
            "seeds",
            "parameters",
            "text",
            "tokens/s, one row, compiled",
            *(f"tokens/s, {'one row' if batch == 1 else f'{batch} rows'}" for batch in batches),
            "FLOPs a text token",
            f"KV bytes at {context:,}",
            *(["training tokens/s"] if trainings else []),
        ]
    ]
    chosen = _chosen(rows, names)
    for row in sorted(rows, key=lambda row: chosen.index(row.name) if row.name in chosen else -1):
        variant = row.rows[0].peer
        if row.name not in chosen or (variant, 1) not in costs:
            continue
        metrics = costs[variant, 1].metrics
        lines.append(
            [
                variant,
                _over_seeds(row),
                "" if row is reference else _beside(row, reference),
                _perplexity_beside(row, reference),
                str(len(row.rows)),
                f"{row.mean('parameters') / 1e6:.2f}M",
                f"{row.rows[0].workload['megabytes']} MB, {row.mean('tokens') / 1e6:.1f}M tokens",
                *(_rate(costs.get(key)) for key in ((f"{variant}, compiled", 1), *((variant, b) for b in batches))),
                f"{flops_of_text(costs[variant, 1]) / 1e6:.1f}M",
                f"{metrics['kv_bytes'].median / 1e6:.2f} MB",
                *([_rate(trainings.get(variant))] if trainings else []),
            ]
        )
    return lines


def _chosen(rows: Sequence[Trained], names: str) -> list[str]:
    """The names asked for, with commas between, or all; raises `InputError` for one that there isn't."""
    known = [row.name for row in rows]
    chosen = names.split(",") if names else known
    for name in chosen:
        if name not in known:
            raise InputError(f"no rows of {name!r}.{nearest(name, known)}")
    return chosen


def flops_of_text(record: Record) -> float:
    """FLOPs of a written token of text, where decoding was measured: ends between are paid for, but are no text."""
    metrics = record.metrics
    return metrics["flops"].median * metrics["tokens_per_second"].median / metrics["text_tokens_per_second"].median


def _over_seeds(row: Trained) -> str:
    bits = row.by_seed().values()
    return f"{row.mean_bits:.4f}" + (f" [{min(bits):.4f}, {max(bits):.4f}]" if len(bits) > 1 else "")


def _rate(record: Record | None) -> str:
    """Text tokens a second."""
    if record is None:
        return ""
    spread = record.metrics["text_tokens_per_second"]
    return f"{spread.median:,.0f} [{spread.low:,.0f}, {spread.high:,.0f}]"


def _beside(row: Trained, base: Trained) -> str:
    """Per cent by which a row's mean bits differ from the base's, and the range that their seeds allow."""
    mean = f"{100 * (row.mean_bits / base.mean_bits - 1):+.1f}%"
    bits, bases = row.by_seed().values(), base.by_seed().values()
    if len(bits) == len(bases) == 1:
        return mean
    low, high = min(bits) / max(bases) - 1, max(bits) / min(bases) - 1
    return f"{mean} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _perplexity_beside(row: Trained, base: Trained) -> str:
    """Per cent by which the perplexity a token differs, at as many bytes a token as the base's training text has."""
    if row is base:
        return ""
    bytes_a_token = base.mean("bytes") / base.mean("tokens")
    return f"{100 * (2 ** (bytes_a_token * (row.mean_bits - base.mean_bits)) - 1):+.1f}%"


def _bits(row: Trained, text: str) -> str:
    spread, mean = row.metric(text + SUFFIX), row.mean(text + SUFFIX)
    return f"{mean:.4f}" if spread.low == spread.high else f"{mean:.4f} [{spread.low:.4f}, {spread.high:.4f}]"


def learning_rates_table(records: Sequence[Record], size: str, megabytes: str) -> list[list[str]]:
    """Mean bits per byte of seed 0, for architectures trained at several rates."""
    by_rate: dict[float, dict[str, Trained]] = {}
    for row in trained([record for record in records if record.workload.get("seed") == 0], size, megabytes):
        for record in row.rows:
            one = Trained(name=row.name, rows=(record,))
            by_rate.setdefault(record.workload["learning_rate"], {})[row.name] = one
    rates = sorted(by_rate)
    names = dict.fromkeys(name for rows in by_rate.values() for name in rows)
    lines = [["", *(f"{rate:g}" for rate in rates)]]
    for name in names:
        cells = {rate: by_rate[rate][name].mean_bits for rate in rates if name in by_rate[rate]}
        if len(cells) == 1:
            continue
        best = min(cells.values())
        shown = {rate: f"**{cell:.4f}**" if cell == best else f"{cell:.4f}" for rate, cell in cells.items()}
        lines.append([name, *(shown.get(rate, "") for rate in rates)])
    return lines


def profile_table(
    records: Sequence[Record], kind: str, names: str, text: str, size: str, megabytes: str, learning_rate: str
) -> list[list[str]]:
    """Bits a token by bin that has tokens: the first architecture's, and how the others' differ; of seeds all have."""
    if kind not in PROFILES:
        raise InputError(f"profile {kind!r} is unknown.{nearest(kind, PROFILES)}")
    rows = {row.name: row for row in trained(records, size, megabytes, learning_rate)}
    first, *others = names.split(",")
    missing = [name for name in (first, *others) if name not in rows]
    if missing:
        raise InputError(f"no rows of {', '.join(missing)}.")
    if any(text not in rows[name].texts for name in (first, *others)):
        raise InputError(f"no rows scored on {text!r}.{nearest(text, rows[first].texts)}")
    rows = of_shared_seeds([rows[name].with_profile(text, kind) for name in (first, *others)])
    base = rows[first].profile(text, kind)
    lines = [["", *PROFILES[kind]], [first, *("" if bits is None else f"{bits:.2f}" for bits in base)]]
    for name in others:
        bits = rows[name].profile(text, kind)
        pairs = zip(bits, base, strict=True)
        lines.append([name, *("" if a is None or b is None else f"{a - b:+.3f}" for a, b in pairs)])
    filled = [0, *(place for place in range(1, len(lines[0])) if any(line[place] for line in lines[1:]))]
    return [[line[place] for place in filled] for line in lines]

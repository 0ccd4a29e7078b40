"""Markdown tables of results, written between marks in READMEs and docs, so that no figure there is typed.

<!-- bench:claims -->                                   goals, and what was measured
<!-- bench:headlines -->                                a few of them
<!-- bench:compression books/valid.txt.xz local,h2o --> thousandths of a bit per byte above full attention
<!-- bench:recall books/valid.txt.xz -->                nats gained on planted facts
<!-- bench:at_bytes 4096 -->                            methods by bytes, on texts of a length
<!-- bench:bits -->                                     bits per byte of checkpoints
<!-- bench:case speed batch1 -->                        all figures of the last run of a case
<!-- bench:architectures -->                            what decoding costs them
<!-- bench:study 1m 10 0.008 -->                        architectures of a size, on 10 MB, at a learning rate
<!-- bench:finalists 1m 10 0.008 -->                    some of them over seeds, with what writing costs
<!-- bench:rates 1m 10 -->                              some of them at several rates
<!-- bench:profile by_offset gpt,fast-2-4 books 1m 10 0.008 -->  bits a token by place, beside the first
<!-- bench:profile by_repeat gpt,fast-2-4 books 1m 40 0.008 -->  by the distance to the same pair of tokens
...
<!-- bench:end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path

from benchmarks.report.claims import CLAIMS, HEADLINES, Verdict, judge, latest
from benchmarks.report.study_tables import (
    finalists_table,
    flops_of_text,
    learning_rates_table,
    profile_table,
    study_table,
)
from thoughtformer.bench.console import shown
from thoughtformer.bench.records import Record
from thoughtformer.errors import InputError, nearest
from thoughtformer.evaluate.tasks import TASKS
from thoughtformer.files import new_file

__all__ = ["claims_table", "renew"]

#: Tasks of `at_bytes`, by metric.
ANSWERS = {f"{task}_of_full": f"{task.replace('_', ' ')}, of full's" for task in TASKS}
BLOCK = re.compile(r"(<!-- bench:(?P<kind>\w+)(?P<arguments>[^>]*) -->\n)(?P<old>.*?)(<!-- bench:end -->)", re.DOTALL)


def claims_table(verdicts: Sequence[Verdict]) -> str:
    """The claims; the FLOPs pairs as one line, their worst."""
    lines = ["| | measured | goal |", "|---|---|---|"]
    flops = [verdict for verdict in verdicts if verdict.claim.theme == "flops"]
    worst = max(flops, key=lambda verdict: verdict.value.median, default=None)
    judged = {id(verdict.claim): verdict for verdict in verdicts}
    for claim in CLAIMS:
        verdict = judged.get(id(claim))
        if verdict is None:
            lines.append(f"| {claim.text} | not measured | |")
            continue
        text = verdict.claim.text
        if verdict in flops:
            if verdict is not worst:
                continue
            text = f"FLOPs of {len(flops)} (prompt, new) pairs, 16+8: furthest off the exact incremental cost"
        lines.append(_line(verdict, text))
    return "\n".join(lines)


def _headlines(records: Sequence[Record]) -> str:
    """Those of README."""
    verdicts = {verdict.claim.text: verdict for verdict in judge(records)}
    missing = [claim.text for claim in HEADLINES if claim.text not in verdicts]
    if missing:
        raise InputError(f"the results don't hold what README shows: {'; '.join(missing)}.")
    lines = [_line(verdicts[claim.text], claim.text) for claim in HEADLINES]
    return "\n".join(["| | measured | goal |", "|---|---|---|", *lines])


def _line(verdict: Verdict, text: str) -> str:
    return f"| {text} | {verdict.shown()} | {verdict.goal()}{'' if verdict.is_met else ', **missed**'} |"


def _claims(records: Sequence[Record]) -> str:
    return claims_table(judge(records))


def _latest(records: Sequence[Record], theme: str, case: str, data: str | None = None) -> list[Record]:
    """A case's records of the last runs; on a text, if one is named, of the last run alone."""
    chosen = [
        record
        for record in latest(records)
        if (record.theme, record.case) == (theme, case) and (data is None or data in record.workload["data"])
    ]
    if not chosen:
        raise InputError(f"the results hold nothing of {theme}, {case}{'' if data is None else ' on ' + data}.")
    if data is None:
        return chosen
    run = chosen[-1].environment.get("run")
    return [record for record in chosen if record.environment.get("run") == run]


def _rows(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest)])


def _compression(records: Sequence[Record], data: str, methods: str = "") -> str:
    """Above full attention, median and range over samples, in thousandths."""
    chosen = [record for record in _latest(records, "quality", "compression", data) if record.metrics]
    full = next((record for record in chosen if record.peer == "full"), None)
    if full is None:
        raise InputError(f"the results on {data} hold nothing of full attention.")
    fractions = sorted({record.workload["removed"] for record in chosen} - {0.0})
    names = methods.split(",") if methods else list(dict.fromkeys(record.peer for record in chosen))
    bits = full.metrics["bits_per_byte"]
    label = f"full attention {bits.median:.3f} [{bits.low:.3f}, {bits.high:.3f}]"
    lines = [[label, *(f"{fraction:.0%}" for fraction in fractions)]]
    if not methods:
        lines[0].append(f"MB held at {fractions[-1]:.0%}")
    for name in names:
        of = {record.workload["removed"]: record for record in chosen if record.peer == name}
        if name in ("full", "kvpress none"):
            continue
        cells = []
        for fraction in fractions:
            if fraction not in of:
                cells.append("")
                continue
            above = of[fraction].metrics["above_full_bits_per_byte"]
            cells.append(f"{1e3 * above.median:+.1f} [{1e3 * above.low:+.1f}, {1e3 * above.high:+.1f}]")
        if not methods and fractions[-1] in of:
            cells.append(f"{of[fractions[-1]].metrics['kv_bytes'].median / 1e6:.2f}")
        lines.append([name, *cells])
    return _rows(lines)


def _recall(records: Sequence[Record], data: str) -> str:
    """Nats gained a token of the fact, with one standard error."""
    chosen = _latest(records, "quality", "recall", data)
    distances = sorted({record.workload["distance"] for record in chosen})
    places = list(dict.fromkeys((record.peer, record.workload["removed"]) for record in chosen))
    lines = [["method", "removed", *(f"{distance} back" for distance in distances)]]
    for peer, removed in places:
        of = {
            record.workload["distance"]: record.metrics["gained_nats"]
            for record in chosen
            if (record.peer, record.workload["removed"]) == (peer, removed)
        }
        cells = [f"{of[distance].median:.3f} ± {of[distance].high - of[distance].median:.3f}" for distance in distances]
        lines.append([peer, f"{removed:.0%}", *cells])
    return _rows(lines)


def _at_bytes(records: Sequence[Record], tokens: str) -> str:
    """Methods by what is in memory: bits above full attention in thousandths, and answers, with one standard error."""
    chosen = [record for record in _latest(records, "quality", "at_bytes") if record.workload["tokens"] == int(tokens)]
    if not chosen:
        raise InputError(f"the results hold nothing of quality, at_bytes at {tokens} tokens.")
    measured = [record for record in chosen if "resident_of_full" in record.metrics]
    tasks = [name for name in dict.fromkeys(name for record in measured for name in record.metrics) if name in ANSWERS]
    lines = [
        ["", "in memory", "read a step", "stored", "above full, mbpb", "texts", *(ANSWERS[name] for name in tasks)]
    ]
    for record in sorted(measured, key=lambda record: -record.metrics["resident_of_full"].median):
        metrics = record.metrics
        above = metrics["above_full_bits_per_byte"]
        sizes = [f"{metrics[f'{kind}_of_full'].median:.3f}" for kind in ("resident", "read", "stored")]
        error = 1e3 * (above.high - above.median)
        answers = [f"{of.median:.0%} of {of.runs}" if (of := metrics.get(name)) is not None else "" for name in tasks]
        lines.append([record.peer, *sizes, f"{1e3 * above.median:+.1f} ± {error:.1f}", str(above.runs), *answers])
    lines += [
        [record.peer, f"skipped: {record.skipped}", *[""] * (len(lines[0]) - 2)] for record in chosen if record.skipped
    ]
    return _rows(lines)


def _bits(records: Sequence[Record]) -> str:
    chosen = _latest(records, "quality", "bits")
    texts = list(dict.fromkeys(tuple(record.workload["data"]) for record in chosen))
    lines = [["bits per byte", *dict.fromkeys(record.peer for record in chosen)]]
    for text in texts:
        of = {record.peer: record for record in chosen if tuple(record.workload["data"]) == text}
        size = next(iter(of.values())).workload["bytes"] / 1e6
        cells = [f"{of[peer].metrics['bits_per_byte'].median:.4f}" if peer in of else "" for peer in lines[0][1:]]
        lines.append([f"{', '.join(text)}, {size:.1f} MB", *cells])
    return _rows(lines)


def _case(records: Sequence[Record], theme: str, case: str) -> str:
    """Every figure of a case's last runs."""
    chosen = _latest(records, theme, case)
    metrics = list(dict.fromkeys(name for record in chosen for name in record.metrics))
    varying = [
        name
        for name in dict.fromkeys(name for record in chosen for name in record.workload)
        if len({str(record.workload.get(name)) for record in chosen}) > 1
    ]
    lines = [[*varying, "peer", *(name.replace("_", " ") for name in metrics)]]
    for record in chosen:
        places = [str(record.workload.get(name, "")) for name in varying]
        figures = [shown(name, record.metrics[name]) if name in record.metrics else "" for name in metrics]
        if record.skipped is not None:
            figures = [f"skipped: {record.skipped}", *[""] * (len(metrics) - 1)]
        lines.append([*places, record.peer, *figures])
    return _rows(lines)


def _architectures(records: Sequence[Record]) -> str:
    """Decoding, what a token costs and what is held, by work and architecture."""
    chosen = [record for record in _latest(records, "speed", "architectures") if record.peer != "memory"]
    lines = [["", "rows, context", "text tokens/s", "FLOPs a text token", "bytes a step touches", "KV bytes, all rows"]]
    for record in chosen:
        work = record.workload
        place = f"{work['layers']} layers, {work['batch']} x {work['context']:,}"
        if record.skipped is not None:
            lines.append([record.peer, place, f"skipped: {record.skipped}", "", "", ""])
            continue
        metrics = record.metrics
        lines.append(
            [
                record.peer,
                place,
                shown("text_tokens_per_second", metrics["text_tokens_per_second"]),
                f"{flops_of_text(record) / 1e6:,.0f}M",
                f"{metrics['touched_bytes'].median / 1e6:,.0f} MB",
                f"{metrics['kv_bytes'].median / 1e6:,.1f} MB",
            ]
        )
    return _rows(lines)


KINDS: dict[str, Callable[..., str]] = {
    "claims": _claims,
    "headlines": _headlines,
    "compression": _compression,
    "recall": _recall,
    "at_bytes": _at_bytes,
    "bits": _bits,
    "case": _case,
    "architectures": _architectures,
    "study": lambda *arguments: _rows(study_table(*arguments)),
    "finalists": lambda *arguments: _rows(finalists_table(*arguments)),
    "rates": lambda *arguments: _rows(learning_rates_table(*arguments)),
    "profile": lambda *arguments: _rows(profile_table(*arguments)),
}


def renewed(text: str, records: Sequence[Record], where: str = "the text") -> str:
    """The text with every table between its marks made anew.

    Raises:
        InputError: no marks, a mark of an unknown kind, or results that a table lacks.
    """
    if not BLOCK.search(text):
        raise InputError(f"{where} has no lines <!-- bench:KIND --> and <!-- bench:end --> to write between.")

    def table(match: re.Match[str]) -> str:
        kind = match["kind"]
        if kind not in KINDS:
            raise InputError(f"{where}: <!-- bench:{kind} --> is unknown.{nearest(kind, KINDS)}")
        if "<!-- bench:" in match["old"]:
            raise InputError(f"{where}: <!-- bench:{kind} --> has no <!-- bench:end --> before the next mark.")
        arguments = match["arguments"].split()
        try:
            signature(KINDS[kind]).bind(records, *arguments)
        except TypeError as error:
            raise InputError(f"{where}: <!-- bench:{kind} --> with {arguments}: {error}.") from None
        return f"{match[1]}{KINDS[kind](records, *arguments)}\n{match[5]}"

    return BLOCK.sub(table, text)


def renew(path: Path, records: Sequence[Record]) -> None:
    """Writes a file's tables anew; errors as of `renewed`, and `OutputError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    with new_file(path, replace=True) as draft:
        draft.write_text(renewed(text, records, str(path)), encoding="utf-8")

"""One self-contained page of all results."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.claims import Verdict, groups, judge, latest
from benchmarks.report.plots import draw_all
from thoughtformer.bench.console import shown
from thoughtformer.bench.records import Record
from thoughtformer.errors import OutputError, UnsupportedError
from thoughtformer.files import new_file

__all__ = ["write_report"]

STYLE = """
html { color-scheme: light dark; --quiet: #59636e; --line: #ddd; --code: #f4f4f4; --missed: #a30000; --met: #00650a; }
@media (prefers-color-scheme: dark) {
  html { background: #0d1117; color: #f0f6fc; --quiet: #9198a1; --line: #30363d; --code: #1c222b; }
  html { --missed: #ff8a80; --met: #4cc38a; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.missed td:last-child { color: var(--missed); } tr.met td:last-child { color: var(--met); }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption, .quiet { color: var(--quiet); font-size: .9em; }
code { background: var(--code); padding: .1em .3em; overflow-wrap: anywhere; } details { margin: 1rem 0; }
"""


def write_report(records: Sequence[Record], out: Path) -> list[Path]:
    """Writes report.html, with all pictures inside, and the pictures beside it; returns the files.

    Raises:
        UnsupportedError: matplotlib isn't installed.
        OutputError: the folder can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = draw_all(records, out)
    except ImportError:
        raise UnsupportedError("pictures need matplotlib: pip install matplotlib.") from None
    except OSError as error:
        raise OutputError(f"can't write to {out}: {error}") from None
    page = out / "report.html"
    with new_file(page, replace=True) as draft:
        draft.write_text(_page(records, pictures), encoding="utf-8")
    return [page, *(path for _, paths in pictures for path in paths)]


def _page(records: Sequence[Record], pictures: Sequence[tuple[str, list[Path]]]) -> str:
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Thoughtformer: benchmarks</title><style>{STYLE}</style></head><body>",
        "<h1>Thoughtformer: benchmarks</h1>",
        "<p>Every timed peer has a KV cache. Peers of a comparison ran in turns within one command. Figures are "
        "medians, with the smallest and largest of the runs in brackets; absolute times are this machine's, the "
        "ratios are the point.</p>",
        _claims(judge(records)),
    ]
    for caption, (light, dark) in pictures:
        text = html.escape(caption)
        parts.append(
            f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{_inside(dark)}'>"
            f"<img alt='{text}' src='{_inside(light)}'></picture><figcaption>{text}</figcaption></figure>"
        )
    parts.append("<h2>All figures</h2>")
    parts += [_group(list(group.values())) for group in groups(latest(records))]
    parts.append("</body></html>")
    return "\n".join(parts)


def _inside(picture: Path) -> str:
    """A picture as an address that holds all of it."""
    return "data:image/svg+xml;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


def _claims(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    rows = "".join(
        f"<tr class='{'met' if verdict.is_met else 'missed'}'><td>{html.escape(verdict.claim.text)}<br>"
        f"<code>{html.escape(verdict.command)}</code></td><td class='number'>{verdict.shown()}</td>"
        f"<td class='number'>{verdict.goal()}</td><td>{'met' if verdict.is_met else 'missed'}</td></tr>"
        for verdict in verdicts
    )
    return (
        "<h2>What was set out for</h2><table><thead><tr><th>claim and command</th><th>measured</th><th>goal</th>"
        f"<th></th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _group(records: list[Record]) -> str:
    first = records[0]
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    workload = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in first.workload.items())
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in ("peer", *metrics))
    rows = []
    for record in records:
        if record.skipped is not None:
            cells = f"<td colspan='{max(len(metrics), 1)}'>skipped: {html.escape(record.skipped)}</td>"
        else:
            cells = "".join(
                f"<td class='number'>{shown(name, record.metrics[name]) if name in record.metrics else ''}</td>"
                for name in metrics
            )
        rows.append(f"<tr><td>{html.escape(record.peer)}</td>{cells}</tr>")
    where = json.dumps(first.environment, ensure_ascii=False)
    return (
        f"<h3>{html.escape(first.theme)}, {html.escape(first.case)}</h3><p>{html.escape(workload)}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"<details class='quiet'><summary>command and environment</summary><p><code>{html.escape(first.command)}</code>"
        f"</p><p><code>{html.escape(where)}</code></p></details>"
    )

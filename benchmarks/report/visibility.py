"""The front page's drawing: who sees whom by four rules, all at once and step by step, and what the cache holds.

    python -m benchmarks.report.visibility docs/images

Every square comes of the package's own rules; the drawing has a light and a dark version.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from thoughtformer.compression import EveryTokens, Sentinel, StreamingLLM
from thoughtformer.compression.method import Method, read_ids
from thoughtformer.files import new_file
from thoughtformer.rules.entries import OPEN, entries_mask
from thoughtformer.rules.rule import BodyRule, body_rule, dense_mask
from thoughtformer.rules.schedule import RowProgress, lay_out
from thoughtformer.rules.structure import RowCounters, TokenStructure, read_structure

__all__ = ["draw", "panels"]

TEXT = ("The", "rain", "fell", ".", "We", "stayed", "home", ".", "Nobody", "came", "by")
END = 1
#: Side of a square, and room beside the grids.
SIDE, LEFT, GAP, TOP = 15, 62, 34, 58

COLOURS = {
    "light": {"ink": "#1f2328", "faint": "#d0d7de", "new": "#0969da", "seen": "#54aeff", "folded": "#bf8700"},
    "dark": {"ink": "#e6edf3", "faint": "#30363d", "new": "#58a6ff", "seen": "#1f6feb", "folded": "#d29922"},
}


@dataclass(frozen=True, eq=False)
class Panel:
    """One rule: `mask[i][j]` whether token i sees entry j, and the entries cached after each token."""

    title: str
    note: str
    columns: Sequence[str]
    is_summary: Sequence[bool]
    mask: list[list[bool]]
    cached: list[int]


def panels() -> list[Panel]:
    """The four rules of the drawing."""
    return [
        _of_rule(body_rule("causal"), "a plain GPT", "holds every token"),
        _of_rule(body_rule("hybrid"), "GPTHF", "a closed sentence is one entry"),
        _of_method(StreamingLLM(max_entries=5, first_tokens=1), "a window, without training", "drops what is old"),
        _of_method(
            Sentinel(policy=EveryTokens(span_tokens=3, recent_tokens=1, first_tokens=0, start_tokens=0)),
            "sentinels, trained",
            "a span becomes one entry",
        ),
    ]


def _of_rule(rule: BodyRule, title: str, note: str) -> Panel:
    ids = torch.tensor([END if word == "." else 5 for word in TEXT])
    row = torch.zeros_like(ids)

    def structure(tokens: Tensor) -> TokenStructure:
        start = RowCounters.zeros(1)
        return read_structure(tokens, row[: len(tokens)], start, sentence_end_token_id=END, document_start_token_id=0)

    cached = []
    for count in range(1, len(ids) + 1):
        read = structure(ids[:count])
        cached.append(int(rule.keeps(read, RowCounters.zeros(1).after(read)).sum()))
    mask = dense_mask(rule, structure(ids)).tolist()
    return Panel(title, note, TEXT, [word == "." and rule.name != "causal" for word in TEXT], mask, cached)


def _of_method(method: Method, title: str, note: str) -> Panel:
    ids = list(range(5, 5 + len(TEXT)))
    chunk = lay_out([read_ids(method, RowProgress(), ids)], vocab_size=99, num_summaries=method.num_sentinels_read)
    order = chunk.entries.order[0]
    shown = (order != OPEN).nonzero().squeeze(1)
    mask = entries_mask(chunk.entries, chunk.entries)[0][chunk.token_column[0]][:, shown]
    words = iter(TEXT)
    columns = [next(words) if order[place] < OPEN else "…" for place in shown.tolist()]
    cached, row = [], RowProgress()
    for token in ids:
        read_ids(method, row, [token])
        cached.append(row.num_cached)
    return Panel(title, note, columns, [bool(order[place] > OPEN) for place in shown.tolist()], mask.tolist(), cached)


def draw(theme: str) -> str:
    """The drawing as SVG, `light` or `dark`."""
    colours, drawn, parts = COLOURS[theme], panels(), []
    rows = len(TEXT)
    height = TOP + rows * SIDE + 84
    left = LEFT
    for number, panel in enumerate(drawn):
        parts.append(_text(left, 20, panel.title, colours["ink"], weight=600))
        parts.append(_text(left, 38, panel.note, colours["ink"], opacity=0.75))
        for i, line in enumerate(panel.mask):
            if number == 0:
                parts.append(_text(left - 8, TOP + i * SIDE + 12, TEXT[i], colours["ink"], anchor="end"))
            own = [j for j, is_summary in enumerate(panel.is_summary) if line[j] and not is_summary]
            for j, sees in enumerate(line):
                if not sees:
                    fill = colours["faint"]
                elif j == max(own, default=-1):
                    fill = colours["new"]
                else:
                    fill = colours["folded"] if panel.is_summary[j] else colours["seen"]
                parts.append(_square(left + j * SIDE, TOP + i * SIDE, fill, 1.0 if sees else 0.35))
        parts += _cache(panel, left, TOP + rows * SIDE + 70, colours)
        left += len(panel.columns) * SIDE + GAP
    parts.append(_text(LEFT - 8, TOP + rows * SIDE + 68, "held", colours["ink"], anchor="end"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left} {height}" width="{left}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" '
        'aria-label="Which earlier tokens each token sees, by four rules, and how many entries the cache holds">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _cache(panel: Panel, left: int, bottom: int, colours: dict[str, str]) -> list[str]:
    """The entries cached after each token, as a column each, and how many there are in the end."""
    parts = []
    for number, count in enumerate(panel.cached):
        for level in range(count):
            fill = colours["new"] if level == count - 1 else colours["seen"]
            parts.append(_square(left + number * SIDE, bottom - 4 * level - 4, fill, 0.9, height=3))
    end = left + len(panel.cached) * SIDE
    return [*parts, _text(end + 4, bottom, str(panel.cached[-1]), colours["ink"])]


def _square(x: float, y: float, fill: str, opacity: float, height: int = SIDE - 2) -> str:
    return f'<rect x="{x}" y="{y}" width="{SIDE - 2}" height="{height}" rx="2" fill="{fill}" opacity="{opacity}"/>'


def _text(
    x: float, y: float, text: str, fill: str, *, anchor: str = "start", weight: int = 400, opacity: float = 1
) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}" opacity="{opacity}">'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    for theme in COLOURS:
        path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images") / f"visibility-{theme}.svg"
        with new_file(path, replace=True) as draft:
            draft.write_text(draw(theme), encoding="utf-8")
        print(path)

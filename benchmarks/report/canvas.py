"""What all pictures share: a light and a dark theme, titles that stand alone, names beside lines, and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MARKERS", "THEMES", "Theme", "label_ends", "new_axes", "plain_ticks", "reference_colour", "save"]

MARKERS = "os^Dv<>PX*hd1234"


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a picture: paper, what is written on it, what stands back, and series."""

    name: str
    paper: str
    ink: str
    quiet: str
    grid: str
    series: tuple[str, ...]

    def settings(self) -> dict[Any, Any]:
        """matplotlib's settings that give a picture these colours."""
        from cycler import cycler

        return {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.edgecolor": self.quiet,
            "axes.prop_cycle": cycler(color=self.series),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": self.quiet,
            "ytick.color": self.quiet,
            "grid.color": self.grid,
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.7,
            "lines.markersize": 5,
            "font.size": 10,
            # Text stays text, and the same figures give the same file.
            "svg.fonttype": "none",
            "svg.hashsalt": "thoughtformer",
        }


THEMES = (
    Theme(
        name="light",
        paper="#ffffff",
        ink="#1f2328",
        quiet="#59636e",
        grid="#e4e7eb",
        series=("#0b67c2", "#d1570b", "#0f7f5f", "#b0458f", "#a87900", "#2a95b8", "#8a5a44", "#6c63b5"),
    ),
    Theme(
        name="dark",
        paper="#0d1117",
        ink="#f0f6fc",
        quiet="#9198a1",
        grid="#262c36",
        series=("#58a6ff", "#ff9e64", "#4cc38a", "#f29ad2", "#e3b341", "#6bcbe6", "#d3a08a", "#aaa2f5"),
    ),
)


def new_axes(
    across: str | tuple[str, ...], up: str | tuple[str, ...], title: str, under: str = "", *, height: float = 4.4
) -> tuple[Any, Any]:
    """A figure and its axes: one for each name in a tuple `across`, side by side.

    Args:
        up: of the upward axis that they have in common, or of each.
        title: says what is seen, to somebody who sees nothing else.
        under: how it was measured, in smaller letters.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = (across,) if isinstance(across, str) else across
    width = 8.0 if len(names) == 1 else 4.8 * len(names)
    figure, axes = plt.subplots(
        1, len(names), figsize=(width, height), layout="constrained", sharey=isinstance(up, str), squeeze=False
    )
    for part, name in zip(axes[0], names, strict=True):
        part.set_xlabel(name)
        part.grid(visible=True)
        part.set_axisbelow(True)
    for part, name in zip(axes[0], (up,) if isinstance(up, str) else up, strict=False):
        part.set_ylabel(name)
    # Two lines of room above: the second is written apart, because a title has one size and weight.
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontweight="bold", fontsize=12)
    below = 1 - (0.04 + 1.35 * 12 / 72) / height
    figure.text(0.01, below, under, va="top", fontsize=9, color=mpl.rcParams["xtick.color"])
    return figure, axes[0][0] if isinstance(across, str) else axes[0]


def reference_colour() -> str:
    """The colour of what others are compared with: that of the writing."""
    import matplotlib as mpl

    return mpl.rcParams["text.color"]


def plain_ticks(axis: Any, ticks: Sequence[float], shown: Callable[[float], str] = "{:,g}".format) -> None:
    """Ticks at these places alone, written out."""
    axis.set_ticks(list(ticks), [shown(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def label_ends(axes: Any, ends: Sequence[tuple[str, float, float, Any]]) -> None:
    """Names of lines in the margin on the right: (name, the place of the line's end, its colour).

    They stand as high as the lines end, moved apart where they would cover each other.
    """
    axes.figure.canvas.draw()  # so that scales and limits are final
    place_of = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(place_of.transform((x, y))[1]), name, (x, y), colour) for name, x, y, colour in ends)
    size = 9
    gap = 1.35 * size / 72 / (axes.bbox.height / axes.figure.dpi)
    for at, (_, name, end, colour) in zip(_apart([place[0] for place in placed], gap), placed, strict=True):
        axes.annotate(
            name,
            end,
            (1.04, at),
            textcoords="axes fraction",
            fontsize=size,
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkB": 4},
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places `gap` apart or more, in order, that are nearest to those wanted: blocks of neighbours share a mean."""
    blocks: list[tuple[float, int]] = []
    for number, place in enumerate(wanted):
        total, count = place - number * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before = blocks.pop()
            total, count = total + before[0], count + before[1]
        blocks.append((total, count))
    spread = [total / count for total, count in blocks for _ in range(count)]
    return [place + number * gap for number, place in enumerate(spread)]


def save(draw: Callable[[], Any], path: Path) -> list[Path]:
    """Draws a figure in each theme and writes `NAME-light.svg` and `NAME-dark.svg`."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    written = []
    for theme in THEMES:
        with mpl.rc_context(theme.settings()):
            figure = draw()
            written.append(path.with_name(f"{path.name}-{theme.name}.svg"))
            figure.savefig(written[-1], metadata={"Date": None})
            plt.close(figure)
    return written

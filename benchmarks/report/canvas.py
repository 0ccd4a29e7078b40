"""What all pictures share: axes, markers by which series are told apart beside colour, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["MARKERS", "new_axes", "save"]

MARKERS = "os^Dv<>PX*hd1234"


def new_axes(across: str | tuple[str, ...], up: str, title: str = "") -> tuple[Any, Any]:
    """A figure and its axes: one for each name in a tuple `across`, side by side with a common upward axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = (across,) if isinstance(across, str) else across
    width = 7.2 if len(names) == 1 else 4.8 * len(names)
    figure, axes = plt.subplots(
        1, len(names), figsize=(width, 4.6), constrained_layout=True, sharey=True, squeeze=False
    )
    for part, name in zip(axes[0], names, strict=True):
        part.set_xlabel(name)
        part.grid(visible=True, alpha=0.3)
    axes[0][0].set_ylabel(up)
    if len(names) == 1:
        axes[0][0].set_title(title)
    else:
        figure.suptitle(title)
    return figure, axes[0][0] if isinstance(across, str) else axes[0]


def save(figure: Any, path: Path) -> Path:
    """Writes a figure and closes it."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

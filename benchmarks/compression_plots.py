"""Curves of `thoughtformer compress eval --json`, one picture a result file.

python benchmarks/compression_plots.py books.json wikipedia.json --out docs/methods
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

#: Told apart by shape as well as by colour.
MARKERS = dict(
    zip(
        ("truncation", "local", "scattered", "random", "streaming", "h2o", "combiner", "sentinel"),
        "vs1xD^Po",
        strict=True,
    )
)


def draw(result: Path, out: Path, title: str) -> Path:
    """One picture: increase in bits per byte over full attention, by fraction removed."""
    summary = json.loads(result.read_text())["summary"]
    full = next(line["bits_per_byte"] for line in summary if line["method"] == "full")
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for method, marker in MARKERS.items():
        lines = sorted((line for line in summary if line["method"] == method), key=lambda line: line["removed"])
        if not lines:
            continue
        strong = {"linewidth": 2.5, "zorder": 3} if method == "sentinel" else {"linewidth": 1.2}
        axes.errorbar(
            [100 * line["achieved_removed"] for line in lines],
            [line["bits_per_byte"] - full for line in lines],
            marker=marker,
            label=method,
            **strong,
        )
    axes.set_yscale("symlog", linthresh=0.001)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("entries removed, % of the tokens seen, mean over scored tokens")
    axes.set_ylabel("bits per byte above full attention")
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    path = out / f"compression_{result.stem}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    """Draws every file given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for result in arguments.results:
        print(draw(result, arguments.out, f"tiny-gpt on held-out {result.stem}, blocks of 1,024 tokens"))


if __name__ == "__main__":
    main()

"""Figures in README and docs are those of the results: made by `python -m benchmarks.report --renew`, never typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report.claims import CLAIMS, judge
from benchmarks.report.results import read_results
from benchmarks.report.tables import renewed
from benchmarks.report.visibility import draw
from thoughtformer.bench.records import read_records

ROOT = Path(__file__).parent.parent.parent
RENEWED = (
    "README.md",
    "docs/benchmarks.md",
    "docs/methods/gpthf.md",
    "docs/methods/sentinel.md",
    "docs/methods/compression.md",
    "docs/methods/drafts.md",
)


@pytest.mark.parametrize("name", RENEWED)
def test_tables_are_those_of_the_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert renewed(text, read_results([ROOT / "benchmarks" / "results"]), name) == text


def test_every_claim_was_measured():
    verdicts = judge(read_records([ROOT / "benchmarks" / "results"]))
    assert [verdict.claim for verdict in verdicts] == list(CLAIMS)


def test_every_result_says_where_it_comes_from():
    records = read_records([ROOT / "benchmarks" / "results"])
    assert records
    for record in records:
        # The study was a command of thoughtformer's once.
        assert record.command.startswith(
            ("thoughtformer bench ", "thoughtformer study ", "python -m benchmarks.study ")
        )
        assert record.environment["commit"]
        assert record.environment["versions"]["torch"]
        assert record.environment["threads"] >= 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_drawing_is_that_of_the_rules(theme):
    """`python -m benchmarks.report.visibility` makes it; a rule that changes makes another."""
    assert (ROOT / "docs" / "images" / f"visibility-{theme}.svg").read_text(encoding="utf-8") == draw(theme)

"""What the product answers is what it answered: `tests/golden`, where records are made and kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "golden"))

import recording

KEPT = json.loads(recording.RECORDS.read_text(encoding="utf-8"))
MADE = recording.records() | {"files": recording.OF_FILES}


def as_kept(value: object) -> object:
    """As JSON has it."""
    return json.loads(json.dumps(value))


def test_nothing_is_missing():
    assert {kind: list(several) for kind, several in KEPT.items()} == {
        kind: list(several) for kind, several in MADE.items()
    }
    assert sum(len(several) for several in KEPT["requests"].values()) == 200


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, several in MADE.items() if kind != "bits" for name in several]
)
def test_answers(kind, name):
    assert as_kept(MADE[kind][name]()) == KEPT[kind][name]


@pytest.mark.parametrize("name", MADE["bits"])
def test_bits(name):
    assert MADE["bits"][name]() == pytest.approx(KEPT["bits"][name], rel=1e-10)

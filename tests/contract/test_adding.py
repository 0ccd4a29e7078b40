"""docs/adding.md: what it shows runs as it stands there, and is what its twin says."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import twins
from conftest import TEXTS, chunked_logits, close, full_logits, places_of, tiny_model
from lms import random_ids, step_by_step, tiny_lm
from prose import tiny_pair
from thoughtformer.compression import METHODS, Method, compress
from thoughtformer.compression.solving import Search
from thoughtformer.decode import Drafter
from thoughtformer.engine import Scheduler, runner_of
from thoughtformer.rules import BODY_RULES, BodyRule
from thoughtformer.rules.schedule import Event, RowProgress
from thoughtformer.rules.structure import in_current_document, is_earlier
from thoughtformer.sampling import SamplingParams

PAGE = (Path(__file__).parent.parent.parent / "docs" / "adding.md").read_text(encoding="utf-8")
#: What a file of the package, or a twin's, imports.
IMPORTS = {
    each.__name__: each
    for each in (dataclass, BodyRule, Drafter, Event, Iterable, Iterator, Method, RowProgress, Search, Sequence)
} | {
    "in_current_document": in_current_document,
    "is_earlier": is_earlier,
    "MethodTwin": twins.MethodTwin,
    "RuleTwin": twins.RuleTwin,
}


@pytest.fixture
def shown(monkeypatch):
    """What the page's blocks define, one after the other as a reader would; registered for this test alone."""
    module = types.ModuleType("adding")
    monkeypatch.setitem(sys.modules, "adding", module)
    defined = vars(module)
    defined.update(IMPORTS)
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec("from __future__ import annotations\n" + block, defined)
        yield defined
    finally:
        METHODS.pop("keepers", None)
        BODY_RULES.pop("window", None)


@torch.no_grad()
def test_the_method_shown_is_its_twin(shown):
    twin, model, ids = shown["METHODS"]["keepers"], tiny_lm(), random_ids(1, 50)
    (method,) = twin.cases.values()
    compressed = compress(model, method)
    expected = twin.expected(model, ids[0].tolist(), method, None)
    close(compressed(ids, use_cache=False).logits[0], expected)
    close(step_by_step(compressed, ids)[0], expected)
    assert (expected - model(ids).logits[0]).abs().max() > 1e-3


@torch.no_grad()
def test_the_rule_shown_is_its_twin(shown):
    twin, text = shown["RULES"]["window"], TEXTS["mixed"]
    model = tiny_model(body_visibility="window", **twin.settings)
    close(chunked_logits(model, text, [1] * len(text)), full_logits(model, text))
    rule, places = model.config.body_rule(), places_of(text)
    assert rule.window_tokens == 2
    tokens = model.model._structure(text, torch.zeros_like(text), model.new_cache(1).counters)
    mask = rule.visible(tokens.map(lambda f: f[:, None]), tokens.map(lambda f: f[None]))
    assert mask.tolist() == [[j <= i and twin.reads(places, i, j) for j in range(len(text))] for i in range(len(text))]


def test_the_drafter_shown_saves_steps(shown):
    """On a text that repeats itself, as greedy ones of small models do; and changes nothing of it."""
    reader, params, texts, rounds = runner_of(*tiny_pair()), SamplingParams(max_new_tokens=40), [], []
    for drafter in (None, shown["Again"]()):
        scheduler = Scheduler(reader, drafters=[drafter] if drafter else [])
        request = scheduler.submit("The ferry left. The ferry left. The ferry", params)
        while scheduler.has_work:
            scheduler.round()
        texts.append(request.ids)
        rounds.append(scheduler.stats().rounds)
    assert texts[0] == texts[1]
    assert rounds[1] < rounds[0]

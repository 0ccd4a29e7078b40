"""Drafts: texts of which much, half or nothing was written before, with and without, beside transformers' lookup.

The model's weights are random, so what it writes is given: every peer computes all that it would, and then chooses the
text's next token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from thoughtformer.bench.records import Record
from thoughtformer.bench.running import Options, measured
from thoughtformer.bench.shapes import Size
from thoughtformer.bench.timing import Run
from thoughtformer.convert.llama import as_llama
from thoughtformer.decode import StepCosts, drafter_named
from thoughtformer.engine import Limits, Scheduler, runner_of
from thoughtformer.names import ASSETS
from thoughtformer.sampling import Sampler, SamplingParams

__all__ = ["drafts"]

#: Of a text's words, those that an edit changes.
CHANGED = 0.05
#: Rows of the batch beside a single one.
ROWS = 8
#: Tokens that transformers' lookup proposes.
LOOKED_UP = 7


def drafts(options: Options) -> Iterator[Record]:
    """Tokens a second and a pass of given texts: an edit, half an edit, and new prose."""
    size = options.size
    gpt, tokenizer = size.gpt(), size.tokenizer()
    llama = as_llama(gpt)
    runner = runner_of(gpt, tokenizer)
    for (name, (prompt, text)), rows in ((pair, rows) for pair in _texts(size).items() for rows in (1, ROWS)):
        runs: dict[str, Run] = {}
        for setting in ("off", "suffix"):
            costs = StepCosts()  # measured once, as in an engine that stays
            runs[f"gpt, drafts {setting}"] = lambda setting=setting, costs=costs, prompt=prompt, text=text, rows=rows: (
                _written(runner, setting, costs, prompt, text, rows)
            )
        if rows == 1:
            for peer, more in (("generate", {}), ("prompt lookup", {"prompt_lookup_num_tokens": LOOKED_UP})):
                runs[f"transformers Llama, {peer}"] = lambda more=more, prompt=prompt, text=text: _generated(
                    llama, prompt, text, more
                )
        workload = {"text": name, "batch": rows, "context": len(prompt), "new_tokens": len(text), "size": size.name}
        yield from measured(
            "drafts",
            workload,
            runs,
            {"transformers Llama, prompt lookup": {"prompt_lookup_num_tokens": LOOKED_UP}},
            repeats=options.repeats,
            on_run=lambda peer, number, name=name, rows=rows: options.on_progress(
                f"drafts, {name}, {rows} rows: {peer}, round {number}"
            ),
        )


def _texts(size: Size) -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and what is written after them, in ids, by workload."""
    tokenizer, chooser = size.tokenizer(), random.Random(0)
    words = (ASSETS / "page.txt").read_text(encoding="utf-8").split()
    count = 120 if size.name == "full" else 24
    first, second = words[:count], words[count : 2 * count]
    edited = [chooser.choice(second) if chooser.random() < CHANGED else word for word in first]
    pieces = [first[place : place + 10] + second[place : place + 10] for place in range(0, count, 20)]
    half = [word for piece in pieces for word in piece]

    def ids(text: Sequence[str], *, start: bool) -> list[int]:
        return tokenizer.encode_document(" ".join(text) + "\n\n", complete=False, start=start).tolist()

    prompt = ids(first, start=True)
    return {
        name: (prompt, ids(text, start=False)) for name, text in (("edit", edited), ("half", half), ("new", second))
    }


class _Given(Sampler):
    """Chooses, after working out its choice, what a text has next."""

    def __init__(self, sampler: Sampler, num_prompt: int, text: Sequence[int]) -> None:
        self.__dict__.update(sampler.__dict__)
        self.num_prompt, self.text = num_prompt, text

    def choose(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        super().choose(ids, logits)
        return self.text[len(ids) - self.num_prompt]


def _written(
    runner: Any, setting: str, costs: StepCosts, prompt: list[int], text: list[int], rows: int
) -> dict[str, float]:
    """Tokens a second and a pass, behind the first token."""
    scheduler = Scheduler(runner, Limits(max_rows=rows), drafter=drafter_named(setting), costs=costs)
    # Drawn, not greedy: greedy rows are chosen together, and nobody would be asked.
    params = SamplingParams(max_new_tokens=len(text), ignore_end_of_text=True, temperature=1.0, seed=0)
    asked = [scheduler.prepare(prompt, params) for _ in range(rows)]
    for request in asked:
        request.sampler = _Given(request.sampler, len(prompt), text)
        request.client = str(request.number)  # what one writes isn't copied by another
    scheduler.enqueue(asked)
    scheduler.round()
    started, rounds = time.perf_counter(), scheduler.stats().rounds
    while scheduler.has_work:
        scheduler.round()
    seconds = time.perf_counter() - started
    assert all(request.ids == [*prompt, *text] for request in asked)
    new = rows * (len(text) - 1)
    return {
        "tokens_per_second": new / seconds,
        "tokens_per_pass": new / rows / (scheduler.stats().rounds - rounds),
        "verified_per_token": 1 + (scheduler.stats().drafts.verified - scheduler.stats().drafts.right) / new,
    }


class _GivenScores(LogitsProcessor):
    """Makes a text's next token the likeliest."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            self.first = time.perf_counter()
        if input_ids.shape[1] < len(self.ids):
            scores[:, self.ids[input_ids.shape[1]]] = float("inf")
        return scores


@torch.inference_mode()
def _generated(llama: LlamaForCausalLM, prompt: list[int], text: list[int], more: dict[str, Any]) -> dict[str, float]:
    """Tokens a second and a pass, behind the first token."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    given, hook = _GivenScores([*prompt, *text]), llama.register_forward_pre_hook(count)
    try:
        ids = torch.tensor([prompt])
        output = llama.generate(  # type: ignore[attr-defined]  transformers hides its mixin from type checkers
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(text),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([given]),
            **more,
        )
    finally:
        hook.remove()
    assert given.first is not None
    seconds = time.perf_counter() - given.first
    assert output[0].tolist() == [*prompt, *text]
    return {"tokens_per_second": (len(text) - 1) / seconds, "tokens_per_pass": (len(text) - 1) / max(passes - 1, 1)}

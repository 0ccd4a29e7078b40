"""Drafts: texts of which much, half or nothing was written before, with and without, beside transformers' lookup.

The model's weights are random, so what it writes is given: every peer computes all that it would, and then chooses the
text's next token. Texts called drawn or greedy were written by the bundled GPT, with the same random numbers: so the
bundled hourglass is as often right about them as it would be if that GPT were as large as the one that is timed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from thoughtformer.bench.records import Record
from thoughtformer.bench.running import Options, measured
from thoughtformer.bench.shapes import Size
from thoughtformer.bench.timing import Run
from thoughtformer.convert.llama import as_llama
from thoughtformer.decode import Drafter, DraftModel, StepCosts, Suffix
from thoughtformer.engine import Limits, Scheduler, runner_of
from thoughtformer.engine.request import Request
from thoughtformer.models.loading import load
from thoughtformer.names import ASSETS
from thoughtformer.runners import Runner
from thoughtformer.sampling import Sampler, SamplingParams

__all__ = ["draft_model", "drafts"]

#: Of a text's words, those that an edit changes.
CHANGED = 0.05
#: Rows of the batch beside a single one.
ROWS = 8
#: The bundled models that write a text and draft for it.
WRITER, DRAFTER = "tiny-gpt", "tiny-gpthf"
#: Tokens of a piece, where copied ones and new ones take turns.
PIECE = 12
#: Tokens that transformers' lookup proposes.
LOOKED_UP = 7


def drafts(options: Options) -> Iterator[Record]:
    """Tokens a second and a pass of texts that copies help with: an edit, half an edit, and new prose."""
    runner, llama = _peers(options.size)
    for (name, given), rows in ((pair, rows) for pair in _texts(options.size).items() for rows in (1, ROWS)):
        runs = _engines(runner, {"off": list, "suffix": lambda: [Suffix()]}, given, rows)
        if rows == 1:
            for peer, more in (("generate", {}), ("prompt lookup", {"prompt_lookup_num_tokens": LOOKED_UP})):
                runs[f"transformers Llama, {peer}"] = lambda more=more, given=given: _generated(
                    llama, given.prompt, given.text, more
                )
        yield from _measured("drafts", name, given, rows, runs, options)


def draft_model(options: Options) -> Iterator[Record]:
    """The same of texts that the bundled GPT wrote, with the bundled hourglass to draft."""
    runner, _ = _peers(options.size)
    drafter = load(DRAFTER)
    # New ones for each run: what one has learned of a text must not help the next.
    strategies: dict[str, Callable[[], list[Drafter]]] = {
        "off": list,
        "suffix": lambda: [Suffix()],
        "model": lambda: [DraftModel(*drafter)],
        "both": lambda: [Suffix(), DraftModel(*drafter)],
    }
    for name, given in _written_texts(options.size).items():
        yield from _measured("draft_model", name, given, 1, _engines(runner, strategies, given, 1), options)


def _peers(size: Size) -> tuple[Runner, LlamaForCausalLM]:
    gpt = size.gpt()
    return runner_of(gpt, size.tokenizer()), as_llama(gpt)


def _engines(
    runner: Runner, strategies: Mapping[str, Callable[[], list[Drafter]]], given: Given, rows: int
) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for setting, made in strategies.items():
        costs = StepCosts()  # measured once, as in an engine that stays
        runs[f"gpt, drafts {setting}"] = lambda made=made, costs=costs: _written(runner, made(), costs, given, rows)
    return runs


def _measured(
    case: str, name: str, given: Given, rows: int, runs: dict[str, Run], options: Options
) -> Iterator[Record]:
    workload = {
        "text": name,
        "batch": rows,
        "context": len(given.prompt),
        "new_tokens": len(given.text),
        "size": options.size.name,
    }
    yield from measured(
        case,
        workload,
        runs,
        {"transformers Llama, prompt lookup": {"prompt_lookup_num_tokens": LOOKED_UP}} if case == "drafts" else {},
        repeats=options.repeats,
        on_run=lambda peer, number: options.on_progress(f"{case}, {name}, {rows} rows: {peer}, round {number}"),
    )


@dataclass(frozen=True)
class Given:
    """A prompt, and what is written after it, in ids.

    Attributes:
        temperature: at which the bundled GPT wrote it; None: it was put together of other texts.
    """

    prompt: list[int]
    text: list[int]
    temperature: float | None = None


def _texts(size: Size) -> dict[str, Given]:
    """By workload."""
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
        name: Given(prompt, ids(text, start=False))
        for name, text in (("edit", edited), ("half", half), ("new", second))
    }


def _written_texts(size: Size) -> dict[str, Given]:
    """What the bundled GPT writes behind the same prompt, drawn or greedy, or in turns with what it copies."""
    prompt, new = (given := _texts(size)["new"]).prompt, len(given.text)
    texts = {}
    for name, temperature, is_half in (("drawn", 1.0, False), ("greedy", 0.0, False), ("half drawn", 1.0, True)):
        text = _continued(prompt, prompt[1:] if is_half else [], temperature, new)
        texts[name] = Given(prompt, text, temperature)
    return texts


def _continued(prompt: list[int], copied: Sequence[int], temperature: float, count: int) -> list[int]:
    """What the bundled GPT writes behind a prompt; of every two pieces of the text, one is a piece of `copied`."""
    scheduler = Scheduler(runner_of(*load(WRITER)), Limits(max_rows=1))
    request = _asked(scheduler, prompt, temperature, count)
    text = [copied[place % len(copied)] if copied and place // PIECE % 2 == 0 else None for place in range(count)]
    request.sampler = _Given(request.sampler, len(prompt), text)
    scheduler.enqueue([request])
    while scheduler.has_work:
        scheduler.round()
    return request.ids[len(prompt) :]


def _asked(scheduler: Scheduler, prompt: list[int], temperature: float, count: int) -> Request:
    """A request whose tokens are chosen by its sampler one by one, also where that is greedy."""
    params = SamplingParams(max_new_tokens=count, ignore_end_of_text=True, temperature=1.0, seed=0)
    request = scheduler.prepare(prompt, params)
    greedy = Sampler(replace(params, temperature=temperature), (), torch.device("cpu"), never=request.sampler.never)
    request.sampler = request.sampler if temperature else greedy
    return request


class _Given(Sampler):
    """Chooses, after working out its choice, what a text has next; its choice where the text has none."""

    def __init__(self, sampler: Sampler, num_prompt: int, text: Sequence[int | None]) -> None:
        self.__dict__.update(sampler.__dict__)
        self.num_prompt, self.text = num_prompt, text

    def choose(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        chosen, given = super().choose(ids, logits), self.text[len(ids) - self.num_prompt]
        return chosen if given is None else given


def _written(runner: Any, drafters: Sequence[Drafter], costs: StepCosts, given: Given, rows: int) -> dict[str, float]:
    """Tokens a second and a pass, behind the first token."""
    prompt, text = given.prompt, given.text
    scheduler = Scheduler(runner, Limits(max_rows=rows), drafters=drafters, costs=costs)
    temperature = 1.0 if given.temperature is None else given.temperature
    asked = [_asked(scheduler, prompt, temperature, len(text)) for _ in range(rows)]
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
    new, counts = rows * (len(text) - 1), scheduler.stats().drafts
    return {
        "tokens_per_second": new / seconds,
        "tokens_per_pass": new / rows / (scheduler.stats().rounds - rounds),
        "verified_per_token": 1 + (counts.verified.total() - counts.right.total()) / new,
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

"""Requests of all kinds, and what comes of them with drafters or without."""

from __future__ import annotations

import random

from lms import SERVED
from prose import prose
from thoughtformer.decode import Drafter, StepCosts
from thoughtformer.engine import Limits, Scheduler
from thoughtformer.engine.request import Request
from thoughtformer.sampling import SamplingParams

#: What a second reading dropped can't be found again: such methods refuse drafts.
DRAFTED = [case for case, (_, method) in SERVED.items() if not method.can_reread]


def requests_of(count: int) -> list[tuple[str, SamplingParams, str]]:
    chooser = random.Random(11)
    asked = []
    for number in range(count):
        params = SamplingParams(
            max_new_tokens=chooser.choice([1, 2, 9, 25]),
            temperature=chooser.choice([0.0, 0.0, 1.0]),
            seed=number,
            stop=chooser.choice([(), ("e", "a"), ("ing",)]),
            repetition_penalty=chooser.choice([1.0, 1.3]),
            min_p=chooser.choice([0.0, 0.1]),
            ignore_end_of_text=chooser.random() < 0.5,
        )
        asked.append((prose(chooser.choice([5, 80, 200]), seed=number), params, str(chooser.randint(0, 2))))
    return asked


def answered(
    runner, asked, drafters: Drafter | list[Drafter] | None, *, max_rows: int, costs: StepCosts | None = None
) -> tuple[list[Request], int]:
    """The requests once they have ended, which came at different times, and how many rounds that took."""
    drafters = [drafters] if isinstance(drafters, Drafter) else drafters or []
    scheduler = Scheduler(runner, Limits(max_rows=max_rows), drafters=drafters, costs=costs)
    chooser = random.Random(5)
    requests, waiting = [], list(asked)
    while waiting or scheduler.has_work:
        while waiting and chooser.random() < 0.5:
            prompt, params, client = waiting.pop(0)
            requests.append(scheduler.submit(prompt, params, client=client))
        scheduler.round()
        assert scheduler.batch.cache is None or scheduler.batch.cache.autocommit
        assert scheduler.batch.num_bytes() <= scheduler.admission.most_bytes(scheduler.batch.requests)
    return requests, scheduler.stats().rounds


def told(requests: list[Request]) -> list[tuple]:
    return [(request.ids, "".join(request.text), request.finish_reason) for request in requests]

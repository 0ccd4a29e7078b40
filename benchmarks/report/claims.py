"""What this project says of itself, as ratios of figures from one run, beside what it set out to reach."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thoughtformer.bench.paper import PAIRS
from thoughtformer.bench.records import Record, Spread

__all__ = ["CLAIMS", "HEADLINES", "Claim", "Verdict", "groups", "judge", "latest"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim's measured value; low and high are the extremes that the runs' spreads allow."""

    claim: Claim
    value: Spread
    command: str

    @property
    def is_met(self) -> bool:
        return self.value.median <= self.claim.target if self.claim.at_most else self.value.median >= self.claim.target

    def shown(self) -> str:
        """The measured value, with its range where there is one."""
        value, unit = self.value, self.claim.unit
        figures = [_figure(part, unit) for part in (value.median, value.low, value.high)]
        return figures[0] if figures[1] == figures[2] else f"{figures[0]} [{figures[1]}, {figures[2]}]"

    def goal(self) -> str:
        """The target."""
        return ("≤ " if self.claim.at_most else "≥ ") + _figure(self.claim.target, self.claim.unit)


def _figure(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f}%" if value < 0.1 else f"{100 * value:.0f}%"
    return f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence with a number in it.

    Attributes:
        text: what is compared, beside whom.
        target: what was set out for.
        unit: `x` or `%`.
        at_most: the target is an upper limit.
        measure: the value from one run's records of equal workload, None where they don't hold it.
    """

    text: str
    theme: str
    case: str
    target: float
    measure: Callable[[dict[str, Record]], Spread | None]
    workload: dict[str, Any]
    unit: str = "x"
    at_most: bool = False


Measure = Callable[[dict[str, Record]], Spread | None]


def _times(figure: Spread, factor: float) -> Spread:
    return replace(figure, median=figure.median * factor, low=figure.low * factor, high=figure.high * factor)


def _divided(top: Spread | None, bottom: Spread | None) -> Spread | None:
    """The ratio of two figures, with the worst range that both allow."""
    if top is None or bottom is None:
        return None
    return Spread(
        median=top.median / bottom.median, low=top.low / bottom.high, high=top.high / bottom.low, runs=top.runs
    )


def _ratio(metric: str, over: str, under: str) -> Measure:
    """One peer's figure by another's."""

    def measure(records: dict[str, Record]) -> Spread | None:
        return _divided(*(records[peer].metrics.get(metric) if peer in records else None for peer in (over, under)))

    return measure


def _of_limit(peer: str) -> Measure:
    """Tokens a second by what the memory's rate would allow, were nothing read but the weights."""

    def measure(records: dict[str, Record]) -> Spread | None:
        if peer not in records or "memory" not in records or not records[peer].metrics:
            return None
        rate, weights = records["memory"].metrics["bytes_per_second"], records[peer].workload["weight_bytes"]
        return _divided(records[peer].metrics["tokens_per_second"], _times(rate, 1 / weights))

    return measure


def _off_formula(records: dict[str, Record]) -> Spread | None:
    """How far counted FLOPs are off the formula's."""
    if (record := records.get("gpthf 16+8 fast")) is None:
        return None
    return Spread.of([abs(record.metrics["flops"].median / record.metrics["exact_incremental_flops"].median - 1)])


def _against_generate(records: dict[str, Record]) -> Spread | None:
    """The engine's tokens a second by those of `generate` with whichever cache is faster."""
    speeds = {peer: record.metrics.get("tokens_per_second") for peer, record in records.items()}
    theirs = [speed for peer, speed in speeds.items() if peer.startswith("transformers") and speed is not None]
    return _divided(speeds.get("gpt"), max(theirs, key=lambda speed: speed.median, default=None))


def _of_bytes(fast: str, slow: str) -> Measure:
    """By how much one is faster, in parts of the ratio of the bytes that a step of each touches."""
    faster = _ratio("text_tokens_per_second", fast, slow)

    def measure(records: dict[str, Record]) -> Spread | None:
        if (ratio := faster(records)) is None:
            return None
        fewer = records[fast].metrics["touched_bytes"].median / records[slow].metrics["touched_bytes"].median
        return _times(ratio, fewer)

    return measure


def _claim(
    case: str,
    text: str,
    target: float,
    measure: Measure,
    *,
    theme: str = "speed",
    unit: str = "x",
    at_most: bool = False,
    **workload: Any,
) -> Claim:
    return Claim(
        text=text,
        theme=theme,
        case=case,
        target=target,
        measure=measure,
        workload=workload,
        unit=unit,
        at_most=at_most,
    )


def _prefill(split: str, context: int, target: float) -> Claim:
    text = f"reading a prompt of {context // 1024}k tokens: GPTHF {split} against the plain GPT"
    measure = _ratio("seconds", "gpt", f"gpthf {split}")
    return _claim("prefill", text, target, measure, context=context, size="full")


def _decode(context: int, target: float) -> Claim:
    text = f"writing 16 rows behind {context // 1024}k tokens: GPTHF 4+8 against the plain GPT's preallocated cache"
    measure = _ratio("tokens_per_second", "gpthf 4+8", "gpt")
    return _claim("decode", text, target, measure, context=context, size="full")


def _bytes(context: int, target: float) -> Claim:
    text = f"keys and values of {context // 1024}k tokens: GPTHF 16+8 against 24 layers of plain GPT"
    measure = _ratio("bytes", "gpt", "gpthf 16+8")
    return _claim("kv_bytes", text, target, measure, theme="memory", context=context, layers=24)


def _limit(peer: str, text: str, target: float) -> Claim:
    text = f"{text}: of the memory's limit"
    return _claim("batch1", text, target, _of_limit(peer), unit="%", size="full")


def _deep(program: str, text: str, target: float, *, model: str = "", of_bytes: bool = False) -> Claim:
    """The hourglass of 24 layers, or a `model` of its kind, against the plain GPT, both by the same program."""
    fast, slow = f"hourglass 3+18+3{model}{program}", f"gpt{program}"
    measure = _of_bytes(fast, slow) if of_bytes else _ratio("text_tokens_per_second", fast, slow)
    unit = "%" if of_bytes else "x"
    return _claim("architectures", text, target, measure, unit=unit, size="deep", layers=24, batch=1)


def _hourglass_bytes(kind: str, text: str) -> Claim:
    text = f"keys and values of 4k tokens: hourglass 2+8+2{text} against 12 layers of plain GPT"
    measure = _ratio("kv_bytes", "gpt", f"hourglass 2+8+2{kind}")
    return _claim("architectures", text, 20, measure, size="full", context=4096, batch=1)


def _packed(peer: str, text: str, target: float) -> Claim:
    text = f"32 prompts of 8 to 512 tokens, plain GPT: packed prefill against {text}"
    return _claim("packed", text, target, _ratio("seconds", peer, "gpt, packed"), size="full")


def _known(peer: str, text: str) -> Claim:
    text = f"reading a prompt of 32k tokens: {text}, every sentence in the store, against the plain GPT"
    measure = _ratio("seconds", "gpt", f"{peer}, known")
    return _claim("known", text, 100, measure, size="full", context=32768)


def _requests(over: str, under: str, text: str) -> Claim:
    text = f"16 requests of mixed length: {text}"
    return _claim("requests", text, 3, _ratio("new_tokens_per_second", over, under), size="full")


BATCH8 = "plain GPT through the engine, 8 rows of 1k tokens, against transformers.generate (its faster cache)"
DEEP = "writing one text: hourglass 3+18+3, d 1024, against a GPT of 24 layers, both compiled"
TWO = "writing one text: hourglass 3+18+3, two summaries a sentence, against a GPT of 24 layers, both compiled"
WINDOW = "writing one text: hourglass 3+18+3, a window of eight sentences, against a GPT of 24 layers, both compiled"
OF_BYTES = "of the ratio of bytes touched"
GENERATE = "transformers.generate with its plain twin one at a time"

#: Those of README.
HEADLINES = (
    _prefill("4+8", 32768, 10),
    _deep(", compiled", WINDOW, 2.5, model=", window of 8"),
    _hourglass_bytes(", window of 8", " with a window of eight sentences"),
)
CLAIMS = (
    _prefill("4+8", 4096, 3.5),
    HEADLINES[0],
    _prefill("2+10", 32768, 15),
    _decode(4096, 3.3),
    _decode(16384, 10),
    _bytes(4096, 50),
    _bytes(32768, 70),
    *(
        _claim(
            "pairs",
            f"FLOPs of {prompt} + {new} tokens, 16+8: off the exact incremental cost",
            0.05,
            _off_formula,
            theme="flops",
            unit="%",
            at_most=True,
            prompt=prompt,
            new=new,
            size="full",
        )
        for prompt, new in PAIRS
    ),
    _limit("gpt", "plain GPT through the engine, batch 1", 0.7),
    _limit("gpt, compiled", "plain GPT through the engine, batch 1, compiled", 0.85),
    _limit("gpthf 4+8, compiled", "4+8 through the engine, batch 1, compiled", 0.8),
    _claim("batch8", BATCH8, 1.5, _against_generate, size="full"),
    _deep(", compiled", DEEP, 2.5),
    _deep("", "writing one text: the same, neither compiled", 2.5),
    _deep(", compiled", f"writing one text: the same, both compiled: {OF_BYTES}", 0.9, of_bytes=True),
    _deep(", compiled", TWO, 2.5, model=", 2 summaries"),
    _deep(", compiled", f"{TWO}: {OF_BYTES}", 0.9, model=", 2 summaries", of_bytes=True),
    HEADLINES[1],
    _deep(", compiled", f"{WINDOW}: {OF_BYTES}", 0.9, model=", window of 8", of_bytes=True),
    _hourglass_bytes("", ""),
    _hourglass_bytes(", 2 summaries", " with two summaries a sentence"),
    HEADLINES[2],
    _packed("gpt, padded", "padded", 3),
    _packed("gpt, sorted in batches of 8", "padded, sorted by length in batches of 8", 1.2),
    _known("gpthf 4+8", "4+8"),
    _known("hourglass 2+8+2", "hourglass 2+8+2"),
    _requests(
        "gpt, continuous",
        "gpt, one at a time",
        "plain GPT, continuous batching against one at a time",
    ),
    _requests("hybrid, continuous", "hybrid, one at a time", "hybrid 4+8, the same"),
    _requests("hourglass, continuous", "hourglass, one at a time", "hourglass 2+8+2, the same"),
    _requests(
        "gpt, continuous",
        "transformers Llama, one at a time",
        "plain GPT, continuous batching against transformers.generate one at a time",
    ),
    _requests(
        "hybrid, continuous",
        "transformers Llama, one at a time",
        f"hybrid 4+8, continuous batching, against {GENERATE}",
    ),
    _requests(
        "hourglass, continuous",
        "transformers Llama, one at a time",
        f"hourglass 2+8+2, continuous batching, against {GENERATE}",
    ),
    _requests(
        "gpt, continuous",
        "transformers Llama, padded batch",
        "plain GPT, continuous batching against transformers.generate on one padded batch",
    ),
)


def groups(records: Iterable[Record]) -> list[dict[str, Record]]:
    """Records of one run, case and workload, by peer; later runs last."""
    found: dict[str, dict[str, Record]] = {}
    for record in sorted(records, key=_run_of):
        key = [record.theme, record.case, record.environment.get("run"), record.workload]
        found.setdefault(json.dumps(key, sort_keys=True), {})[record.peer] = record
    return list(found.values())


def _run_of(record: Record) -> str:
    """When its run began, in ISO 8601."""
    return str(record.environment.get("run", ""))


def latest(records: Iterable[Record]) -> list[Record]:
    """Of each case and workload, the records of the last run that has it, and none of earlier ones."""
    last: dict[str, dict[str, Record]] = {}
    for group in groups(records):
        first = next(iter(group.values()))
        last[json.dumps([first.theme, first.case, first.workload], sort_keys=True)] = group
    return [record for group in last.values() for record in group.values()]


def judge(records: Sequence[Record]) -> list[Verdict]:
    """Each claim's value in the last run that measured it; claims without figures are left out."""
    verdicts, together = [], groups(records)
    for claim in CLAIMS:
        for group in reversed(together):
            first = next(iter(group.values()))
            fits = all(first.workload.get(name) == value for name, value in claim.workload.items())
            if (first.theme, first.case) != (claim.theme, claim.case) or not fits:
                continue
            value = claim.measure(group)
            if value is not None:
                verdicts.append(Verdict(claim=claim, value=value, command=first.command))
                break
    return verdicts

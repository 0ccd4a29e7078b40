"""What this project says of itself, as ratios of figures from one run, beside what it set out to reach."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thoughtformer.bench.paper import PAIRS
from thoughtformer.bench.records import Record, Spread

__all__ = ["CLAIMS", "Claim", "Verdict", "groups", "judge", "latest"]


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
        headline: whether README shows it: one of each kind, some that are missed among them.
    """

    text: str
    theme: str
    case: str
    target: float
    measure: Callable[[dict[str, Record]], Spread | None]
    workload: dict[str, Any]
    unit: str = "x"
    at_most: bool = False
    headline: bool = False


def _divided(top: Spread | None, bottom: Spread | None) -> Spread | None:
    """The ratio of two figures, with the worst range that both allow."""
    if top is None or bottom is None:
        return None
    return Spread(
        median=top.median / bottom.median, low=top.low / bottom.high, high=top.high / bottom.low, runs=top.runs
    )


def _ratio(over: tuple[str, str], under: tuple[str, str]) -> Callable[[dict[str, Record]], Spread | None]:
    """One peer's figure by another's."""

    def measure(records: dict[str, Record]) -> Spread | None:
        return _divided(*(records[peer].metrics.get(name) if peer in records else None for peer, name in (over, under)))

    return measure


def _of_limit(peer: str) -> Callable[[dict[str, Record]], Spread | None]:
    """Tokens a second by what the memory's rate would allow, were nothing read but the weights."""

    def measure(records: dict[str, Record]) -> Spread | None:
        if peer not in records or "memory" not in records or not records[peer].metrics:
            return None
        rate, weights = records["memory"].metrics["bytes_per_second"], records[peer].workload["weight_bytes"]
        speed = records[peer].metrics["tokens_per_second"]
        return Spread(
            median=speed.median * weights / rate.median,
            low=speed.low * weights / rate.high,
            high=speed.high * weights / rate.low,
            runs=speed.runs,
        )

    return measure


def _off_formula(peer: str) -> Callable[[dict[str, Record]], Spread | None]:
    def measure(records: dict[str, Record]) -> Spread | None:
        if peer not in records:
            return None
        metrics = records[peer].metrics
        off = abs(metrics["flops"].median / metrics["exact_incremental_flops"].median - 1)
        return Spread.of([off])

    return measure


def _prefill(split: str, context: int, target: float) -> Claim:
    return Claim(
        text=f"prefill of {context // 1024}k tokens, {split} against the plain GPT",
        theme="speed",
        case="prefill",
        target=target,
        measure=_ratio(("gpt", "seconds"), (f"gpthf {split}", "seconds")),
        workload={"context": context, "size": "full"},
    )


def _decode(context: int, target: float) -> Claim:
    return Claim(
        text=f"decoding 16 rows of {context // 1024}k tokens, 4+8 against the plain GPT's preallocated cache",
        theme="speed",
        case="decode",
        target=target,
        measure=_ratio(("gpthf 4+8", "tokens_per_second"), ("gpt", "tokens_per_second")),
        workload={"context": context, "size": "full"},
    )


def _bytes(context: int, target: float) -> Claim:
    return Claim(
        text=f"KV bytes at {context // 1024}k tokens, 16+8 against 24 layers of plain GPT",
        theme="memory",
        case="kv_bytes",
        target=target,
        measure=_ratio(("gpt", "bytes"), ("gpthf 16+8", "bytes")),
        workload={"context": context, "layers": 24},
    )


def _limit(peer: str, text: str, target: float) -> Claim:
    return Claim(
        text=text,
        theme="speed",
        case="batch1",
        target=target,
        unit="%",
        measure=_of_limit(peer),
        workload={"size": "full"},
    )


def _against_generate(records: dict[str, Record]) -> Spread | None:
    """The engine's tokens a second by those of `generate` with whichever cache is faster."""
    speeds = {peer: record.metrics.get("tokens_per_second") for peer, record in records.items()}
    theirs = [speed for peer, speed in speeds.items() if peer.startswith("transformers") and speed is not None]
    return _divided(speeds.get("gpt"), max(theirs, key=lambda speed: speed.median, default=None))


def _deep(program: str, text: str, target: float, *, model: str = "", of_bytes: bool = False) -> Claim:
    """The hourglass of 24 layers, or a `model` of its kind, against the plain GPT, both by the same program."""
    fast, slow = f"hourglass 3+18+3{model}{program}", f"gpt{program}"
    faster = _ratio((fast, "text_tokens_per_second"), (slow, "text_tokens_per_second"))

    def measure(records: dict[str, Record]) -> Spread | None:
        ratio = faster(records)
        if ratio is None or not of_bytes:
            return ratio
        bytes_ratio = records[slow].metrics["touched_bytes"].median / records[fast].metrics["touched_bytes"].median
        return Spread(
            median=ratio.median / bytes_ratio,
            low=ratio.low / bytes_ratio,
            high=ratio.high / bytes_ratio,
            runs=ratio.runs,
        )

    return Claim(
        text=text,
        theme="speed",
        case="architectures",
        target=target,
        unit="%" if of_bytes else "x",
        measure=measure,
        workload={"size": "deep", "layers": 24, "batch": 1},
    )


def _hourglass_bytes(peer: str, text: str) -> Claim:
    return Claim(
        text=f"KV bytes at 4k tokens, {text} against 12 layers of plain GPT",
        theme="speed",
        case="architectures",
        target=20,
        measure=_ratio(("gpt", "kv_bytes"), (peer, "kv_bytes")),
        workload={"size": "full", "context": 4096, "batch": 1},
    )


def _packed(peer: str, text: str, target: float) -> Claim:
    return Claim(
        text=f"32 prompts of 8 to 512 tokens, plain GPT: packed prefill against {text}",
        theme="speed",
        case="packed",
        target=target,
        measure=_ratio((peer, "seconds"), ("gpt, packed", "seconds")),
        workload={"size": "full"},
    )


def _known(peer: str, text: str) -> Claim:
    return Claim(
        text=f"prefill of 32k tokens, {text}, every sentence in the store, against the plain GPT",
        theme="speed",
        case="known",
        target=100,
        measure=_ratio(("gpt", "seconds"), (f"{peer}, known", "seconds")),
        workload={"size": "full", "context": 32768},
    )


def _requests(over: str, under: str, text: str) -> Claim:
    return Claim(
        text=f"16 requests of mixed length: {text}",
        theme="speed",
        case="requests",
        target=3,
        measure=_ratio((over, "new_tokens_per_second"), (under, "new_tokens_per_second")),
        workload={"size": "full"},
    )


def _headline(claim: Claim) -> Claim:
    return replace(claim, headline=True)


TWO = "decoding one row, the same hourglass with two summaries a sentence against that GPT"
WINDOW = "decoding one row, the same hourglass with a window of eight sentences against that GPT"

CLAIMS = (
    _headline(_prefill("4+8", 4096, 3.5)),
    _headline(_prefill("4+8", 32768, 10)),
    _prefill("2+10", 32768, 15),
    _headline(_decode(4096, 3.3)),
    _decode(16384, 10),
    _headline(_bytes(4096, 50)),
    _bytes(32768, 70),
    *(
        Claim(
            text=f"FLOPs of {prompt} + {new} tokens, 16+8: off the exact incremental cost",
            theme="flops",
            case="pairs",
            target=0.05,
            unit="%",
            at_most=True,
            measure=_off_formula("gpthf 16+8 fast"),
            workload={"prompt": prompt, "new": new, "size": "full"},
        )
        for prompt, new in PAIRS
    ),
    _headline(_limit("gpt", "plain GPT through the engine, batch 1: of the memory's limit", 0.7)),
    _limit("gpt, compiled", "plain GPT through the engine, batch 1, compiled: of the memory's limit", 0.85),
    _limit("gpthf 4+8, compiled", "4+8 through the engine, batch 1, compiled: of the memory's limit", 0.8),
    Claim(
        text="plain GPT through the engine, 8 rows of 1k tokens, against transformers.generate (its faster cache)",
        theme="speed",
        case="batch8",
        target=1.5,
        measure=_against_generate,
        workload={"size": "full"},
    ),
    _headline(
        _deep(", compiled", "decoding one row, hourglass 3+18+3 against a GPT of 24 layers, d 1024, both compiled", 2.5)
    ),
    _deep("", "the same, neither compiled", 2.5),
    _deep(", compiled", "the same, both compiled: of the ratio of bytes touched", 0.9, of_bytes=True),
    _deep(", compiled", f"{TWO}, both compiled", 2.5, model=", 2 summaries"),
    _deep(
        ", compiled",
        f"{TWO}, both compiled: of the ratio of bytes touched",
        0.9,
        model=", 2 summaries",
        of_bytes=True,
    ),
    _headline(_deep(", compiled", f"{WINDOW}, both compiled", 2.5, model=", window of 8")),
    _deep(
        ", compiled",
        f"{WINDOW}, both compiled: of the ratio of bytes touched",
        0.9,
        model=", window of 8",
        of_bytes=True,
    ),
    _hourglass_bytes("hourglass 2+8+2", "hourglass 2+8+2"),
    _hourglass_bytes("hourglass 2+8+2, 2 summaries", "hourglass 2+8+2 with two summaries a sentence"),
    _headline(_hourglass_bytes("hourglass 2+8+2, window of 8", "hourglass 2+8+2 with a window of eight sentences")),
    _packed("gpt, padded", "padded", 3),
    _packed("gpt, sorted in batches of 8", "padded, sorted by length in batches of 8", 1.2),
    _headline(_known("gpthf 4+8", "4+8")),
    _known("hourglass 2+8+2", "hourglass 2+8+2"),
    _headline(
        _requests("gpt, continuous", "gpt, one at a time", "plain GPT, continuous batching against one at a time")
    ),
    _requests("hybrid, continuous", "hybrid, one at a time", "hybrid 4+8, the same"),
    _requests("hourglass, continuous", "hourglass, one at a time", "hourglass 2+8+2, the same"),
    _requests(
        "gpt, continuous",
        "transformers Llama, one at a time",
        "plain GPT, continuous batching against transformers.generate one at a time",
    ),
    _headline(
        _requests(
            "hybrid, continuous",
            "transformers Llama, one at a time",
            "hybrid 4+8, continuous batching, against transformers.generate with its plain twin one at a time",
        )
    ),
    _requests(
        "hourglass, continuous",
        "transformers Llama, one at a time",
        "hourglass 2+8+2, continuous batching, against transformers.generate with its plain twin one at a time",
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

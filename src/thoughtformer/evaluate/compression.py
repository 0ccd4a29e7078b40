"""Methods on equal terms: the same scored tokens, at equal numbers of entries held.

Blocks of one document each are read whole; the tokens of their second half are scored. `removed` is one minus entries
held by tokens seen, both summed over the scored tokens: what a token can read, itself and everything else included. A
method's own setting (a budget, a fraction, a piece length) is solved for, so that all methods agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from thoughtformer.compression.combiner import Combiner
from thoughtformer.compression.compressed import CompressedModel
from thoughtformer.compression.evicting import Full, Local, RandomEviction, Scattered, Truncation
from thoughtformer.compression.heavy_hitters import HeavyHitters
from thoughtformer.compression.method import Method, entries_held
from thoughtformer.compression.policies import RemovedFraction
from thoughtformer.compression.sentinel import Sentinel
from thoughtformer.compression.settings import settings_of
from thoughtformer.compression.streaming import StreamingLLM
from thoughtformer.errors import ConfigError, CorpusError

__all__ = ["Blocks", "MethodScore", "equal_methods", "sample_blocks", "score_method", "summarise"]

#: How far a method's mean of entries held may be from the target.
TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of ids, what is scored of each, and how many bytes of text that is."""

    ids: list[list[int]]
    first_scored: int
    num_bytes: int

    @property
    def num_scored(self) -> int:
        return sum(len(block) - self.first_scored for block in self.ids)


@dataclass(frozen=True, kw_only=True)
class MethodScore:
    """One method on one sample of blocks. Entries are means over the scored tokens; the peak is their largest."""

    method: str
    settings: dict[str, Any]
    removed: float
    achieved_removed: float
    mean_entries: float
    peak_entries: int
    mean_kv_bytes: float
    bits_per_byte: float
    loss_nats: float
    num_tokens: int
    seed: int


def sample_blocks(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    context_tokens: int,
    num_blocks: int,
    seeds: Sequence[int],
    first_scored: int | None = None,
) -> dict[int, Blocks]:
    """For each seed, blocks that no other seed has, drawn at random from all whole blocks of the documents.

    Raises:
        CorpusError: too few whole blocks.
    """
    first_scored = context_tokens // 2 if first_scored is None else first_scored
    if not 1 <= first_scored < context_tokens:
        raise ConfigError(f"first_scored={first_scored} must be at least 1 and below context_tokens={context_tokens}.")
    whole = []
    for document in documents:
        ids = tokenizer.encode_document(document, complete=True)
        whole += [
            ids[start : start + context_tokens] for start in range(0, len(ids) - context_tokens + 1, context_tokens)
        ]
    needed = num_blocks * len(seeds)
    if len(whole) < needed:
        raise CorpusError(
            f"the text makes {len(whole)} blocks of {context_tokens} tokens, but {len(seeds)} samples of {num_blocks} "
            "need more. Give more text, or lower num_blocks or context_tokens."
        )
    order = np.random.default_rng(seeds[0]).permutation(len(whole))[:needed].reshape(len(seeds), num_blocks)
    samples = {}
    for seed, chosen in zip(seeds, order, strict=True):
        ids = [whole[number].tolist() for number in sorted(chosen)]
        num_bytes = sum(
            len(tokenizer.decode(block).encode()) - len(tokenizer.decode(block[:first_scored]).encode())
            for block in ids
        )
        samples[seed] = Blocks(ids=ids, first_scored=first_scored, num_bytes=num_bytes)
    return samples


def mean_entries(method: Method, blocks: Blocks) -> tuple[float, int]:
    """Mean and largest number of entries that a scored token can read."""
    held = [entries_held(method, ids)[blocks.first_scored :] for ids in blocks.ids]
    return float(np.mean(held)), int(np.max(held))


def span_for(removed: float, num_summaries: int, context_tokens: int) -> int:
    """Tokens a span: the best of some by the bundled adapter's loss (docs/log.md), shorter in short contexts."""
    wanted = max(32.0, 4 * num_summaries / (1 - removed))
    least = max(1.6 * num_summaries / (1 - removed), num_summaries + 1)
    return round(max(min(wanted, context_tokens / 16), least))


def equal_methods(
    names: Sequence[str],
    removed: float,
    blocks: Blocks,
    *,
    seed: int,
    num_sentinels: int = 1,
    see_earlier: bool = False,
    span_tokens: int | None = None,
) -> dict[str, Method]:
    """The named methods, each set so that its mean of entries held is that of `removed`.

    Raises:
        ConfigError: a method that no setting brings within one per cent.
    """
    seen = np.arange(1, len(blocks.ids[0]) + 1)[blocks.first_scored :].mean()
    target = float((1 - removed) * seen)
    return {
        name: _solved(name, target, removed, blocks, seed, num_sentinels, see_earlier, span_tokens) for name in names
    }


def _solved(
    name: str,
    target: float,
    removed: float,
    blocks: Blocks,
    seed: int,
    num_sentinels: int,
    see_earlier: bool,
    span_tokens: int | None,
) -> Method:
    # All methods but those that read ids hold the same in every block.
    one = replace(blocks, ids=blocks.ids[:1])
    budgets = list(range(6, len(blocks.ids[0]) + 1))
    fractions = [removed + shift / 1000 for shift in range(40, -51, -1) if 0 <= removed + shift / 1000 < 1]

    def nearest_of(make: Callable[[Any], Method], choices: list[Any]) -> Method:
        return min((make(choice) for choice in choices), key=lambda method: abs(mean_entries(method, one)[0] - target))

    def crossing(make: Callable[[Any], Method], choices: list[Any]) -> Method:
        return nearest_of(make, _around(make, target, one, choices))

    def folding(num_summaries: int, make: Callable[[RemovedFraction], Method]) -> Iterator[Method]:
        # In short blocks whole spans move the mean by more than one per cent: neighbouring lengths are tried as well.
        wanted = span_for(removed, num_summaries, len(blocks.ids[0])) if span_tokens is None else span_tokens
        shifts = [0] if span_tokens is not None else sorted(range(-8, 9), key=abs)
        spans = [wanted + shift for shift in shifts]
        for span in spans:
            if span > num_summaries:
                yield crossing(
                    lambda fraction, span=span: make(RemovedFraction(removed=fraction, span_tokens=span)), fractions
                )

    def candidates() -> Iterator[Method]:
        if name == "full":
            yield Full()
        elif name == "truncation":
            yield nearest_of(lambda tokens: Truncation(piece_tokens=tokens), budgets)
        elif name == "local":
            yield crossing(lambda fraction: Local(removed=fraction), fractions)
        elif name == "scattered":
            for draw in range(3):
                yield nearest_of(
                    lambda fraction, draw=draw: Scattered(removed=fraction, seed=seed + 1000 * draw), fractions
                )
        elif name == "random":
            yield crossing(
                lambda entries: RandomEviction(max_entries=entries, seed=seed, recent_tokens=min(16, entries // 4)),
                budgets,
            )
        elif name == "streaming":
            yield crossing(lambda entries: StreamingLLM(max_entries=entries), budgets)
        elif name == "h2o":
            yield crossing(lambda entries: HeavyHitters(max_entries=entries), budgets)
        elif name == "combiner":
            yield from folding(1, lambda policy: Combiner(policy=policy))
        else:
            yield from folding(
                num_sentinels,
                lambda policy: Sentinel(policy=policy, num_sentinels=num_sentinels, see_earlier=see_earlier),
            )

    closest = 0.0
    for method in candidates():
        found = mean_entries(method, one)[0]
        if name == "full" or abs(found / target - 1) <= TOLERANCE:
            return method
        closest = min(closest, found, key=lambda held: abs(held - target))
    raise ConfigError(
        f"{name} can't hold {target:.1f} entries on average ({removed:.0%} removed of {len(blocks.ids[0])} tokens): "
        f"the closest setting holds {closest:.1f}. Take longer blocks, or another fraction."
    )


def _around(make: Callable[[Any], Method], target: float, blocks: Blocks, choices: list[Any]) -> list[Any]:
    """The choices next to where the mean of entries, which grows with them, crosses the target."""
    low, high = 0, len(choices) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if mean_entries(make(choices[middle]), blocks)[0] < target:
            low = middle
        else:
            high = middle
    return choices[max(low - 1, 0) : high + 2]


@torch.inference_mode()
def score_method(
    compressed: CompressedModel, blocks: Blocks, *, removed: float, seed: int, batch_size: int = 8
) -> MethodScore:
    """The scored tokens' loss under a method, read at once."""
    total, backbone = 0.0, compressed.backbone
    for start in range(0, len(blocks.ids), batch_size):
        ids = torch.tensor(blocks.ids[start : start + batch_size])
        real = torch.ones_like(ids, dtype=torch.bool)
        wanted = real.clone()
        wanted[:, : blocks.first_scored - 1] = False
        wanted[:, -1] = False
        hidden = compressed.read(ids, real, None, wanted=wanted)
        targets = ids[:, blocks.first_scored :].reshape(-1).to(hidden.device)
        for part in range(0, len(targets), 1024):
            logits = backbone.head()(hidden[part : part + 1024]).float()
            total += float(F.cross_entropy(logits, targets[part : part + 1024], reduction="sum"))
    mean, peak = mean_entries(compressed.method, blocks)
    seen = np.arange(1, len(blocks.ids[0]) + 1)[blocks.first_scored :].mean()
    return MethodScore(
        method=compressed.method.name,
        settings=settings_of(compressed.method),
        removed=removed,
        achieved_removed=1 - mean / float(seen),
        mean_entries=mean,
        peak_entries=peak,
        mean_kv_bytes=mean * backbone.kv_bytes_per_entry(),
        bits_per_byte=total / math.log(2) / blocks.num_bytes,
        loss_nats=total / blocks.num_scored,
        num_tokens=blocks.num_scored,
        seed=seed,
    )


def summarise(scores: Iterable[MethodScore]) -> Iterator[dict[str, Any]]:
    """For each method and fraction removed, mean and standard deviation over the seeds."""
    groups: dict[tuple[str, float], list[MethodScore]] = {}
    for score in scores:
        groups.setdefault((score.method, score.removed), []).append(score)
    for (method, removed), group in groups.items():
        bits = np.array([score.bits_per_byte for score in group])
        yield {
            "method": method,
            "removed": removed,
            "bits_per_byte": float(bits.mean()),
            "bits_per_byte_std": float(bits.std(ddof=1)) if len(bits) > 1 else 0.0,
            "loss_nats": float(np.mean([score.loss_nats for score in group])),
            "achieved_removed": float(np.mean([score.achieved_removed for score in group])),
            "mean_entries": float(np.mean([score.mean_entries for score in group])),
            "peak_entries": max(score.peak_entries for score in group),
            "mean_kv_bytes": float(np.mean([score.mean_kv_bytes for score in group])),
            "num_seeds": len(group),
        }

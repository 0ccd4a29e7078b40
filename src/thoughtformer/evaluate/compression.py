"""Methods on equal terms: the same scored tokens, at equal numbers of entries held.

Blocks of one document each are read whole; the tokens of their second half are scored. `removed` is one minus entries
held by tokens seen, both summed over the scored tokens: what a token can read, itself and everything else included. A
method's own setting (a budget, a fraction, a piece length) is solved for, so that all methods agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from thoughtformer.compression.method import CacheBytes, Method, cached_entries, read_ids
from thoughtformer.compression.model import CompressedModel
from thoughtformer.compression.registry import METHODS, settings_of
from thoughtformer.compression.solving import Search
from thoughtformer.errors import ConfigError, CorpusError
from thoughtformer.rules.schedule import RowProgress

__all__ = [
    "Blocks",
    "MethodScore",
    "mean_cache_bytes",
    "sample_blocks",
    "score_method",
    "solve",
    "summarise",
    "summed_loss",
]

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
    cached = [cached_entries(method, ids)[blocks.first_scored :] for ids in blocks.ids]
    return float(np.mean(cached)), int(np.max(cached))


def solve(
    name: str,
    removed: float,
    blocks: Blocks,
    *,
    seed: int,
    span_tokens: int | None = None,
    trained: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: Any = None,
) -> Method:
    """The named method, set so that its mean of entries held is that of `removed`.

    Args:
        name: of `METHODS`.
        removed: fraction of the tokens seen that isn't held, on average over the scored tokens.
        blocks: the texts.
        seed: of methods that draw.
        span_tokens: of methods that fold; default: what suits the fraction.
        trained: what the adapter in use was trained with.
        tokenizer: for methods that go by what tokens say.

    Raises:
        ConfigError: no setting brings it within one per cent.
    """
    seen = np.arange(1, len(blocks.ids[0]) + 1)[blocks.first_scored :].mean()
    one = replace(blocks, ids=blocks.ids[:1])

    def mean(method: Method) -> float:
        # Methods that don't read ids hold the same in every block.
        return mean_entries(method, blocks if method.reads_ids else one)[0]

    search = Search(
        target=float((1 - removed) * seen),
        removed=removed,
        num_tokens=len(blocks.ids[0]),
        mean_entries=mean,
        seed=seed,
        span_tokens=span_tokens,
        trained=trained,
        tokenizer=tokenizer,
    )
    means: list[float] = []
    for method in METHODS[name].at_entries(search):
        means.append(mean(method))
        # What has no setting holds what it holds, whatever it is to be compared with.
        if not fields(method) or abs(means[-1] / search.target - 1) <= TOLERANCE:
            return method
    closest = min(means, key=lambda cached: abs(cached - search.target), default=0.0)
    raise ConfigError(
        f"{name} can't hold {search.target:.1f} entries on average ({removed:.0%} removed of {search.num_tokens} "
        f"tokens): the closest setting holds {closest:.1f}. Take longer blocks, or another fraction."
    )


@torch.inference_mode()
def score_method(
    compressed: CompressedModel, blocks: Blocks, *, removed: float, seed: int, batch_size: int = 8
) -> MethodScore:
    """The scored tokens' loss under a method, read at once."""
    total = summed_loss(compressed, blocks, batch_size=batch_size)
    mean, peak = mean_entries(compressed.method, blocks)
    seen = np.arange(1, len(blocks.ids[0]) + 1)[blocks.first_scored :].mean()
    return MethodScore(
        method=compressed.method.name,
        settings=settings_of(compressed.method),
        removed=removed,
        achieved_removed=1 - mean / float(seen),
        mean_entries=mean,
        peak_entries=peak,
        mean_kv_bytes=mean_cache_bytes(compressed, blocks),
        bits_per_byte=total / math.log(2) / blocks.num_bytes,
        loss_nats=total / blocks.num_scored,
        num_tokens=blocks.num_scored,
        seed=seed,
    )


@torch.inference_mode()
def summed_loss(compressed: CompressedModel, blocks: Blocks, *, batch_size: int = 8) -> float:
    """Nats of all scored tokens, read at once."""
    total = 0.0
    for start in range(0, len(blocks.ids), batch_size):
        ids = torch.tensor(blocks.ids[start : start + batch_size])
        real = torch.ones_like(ids, dtype=torch.bool)
        wanted = real.clone()
        wanted[:, : blocks.first_scored - 1] = False
        wanted[:, -1] = False
        hidden = compressed.read(ids, real, None, wanted=wanted)
        targets = ids[:, blocks.first_scored :].reshape(-1).to(hidden.device)
        for part in range(0, len(targets), 1024):
            logits = compressed.backbone.logits(hidden[part : part + 1024]).float()
            total += float(F.cross_entropy(logits, targets[part : part + 1024], reduction="sum"))
    return total


def mean_cache_bytes(
    compressed: CompressedModel, blocks: Blocks, *, dtype: torch.dtype | None = None, kind: CacheBytes = "stored"
) -> float:
    """Bytes of a row's cache, all that it holds counted, as each scored token finds it; on average.

    Args:
        compressed: the model under a method.
        blocks: the texts.
        dtype: of keys and values; None: the model's.
        kind: all that is stored, what of it is in memory, or what a step reads of it.
    """
    sizes: dict[tuple[int, ...], int] = {}
    found: list[int] = []
    for ids in blocks.ids if compressed.method.reads_ids else blocks.ids[:1]:
        row = RowProgress()
        for number, token in enumerate(ids):
            if number >= blocks.first_scored:
                stored = compressed.num_stored(row)
                if stored not in sizes:
                    sizes[stored] = compressed.cache_bytes(stored, 1, dtype=dtype, kind=kind)
                found.append(sizes[stored])
            read_ids(compressed.method, row, [token])
    return float(np.mean(found))


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

"""What a GPTHF holds while it writes: which stages keep entries, how many at most, and their bytes by formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Int
from torch import Tensor

from thoughtformer.cache import GPTHFCache, StageCache
from thoughtformer.cache.shape import KVShape
from thoughtformer.cache.slots import slots_bytes
from thoughtformer.cache.stage import FIELDS
from thoughtformer.models.gpthf.configuration import GPTHFConfig
from thoughtformer.models.gpthf.stages import Stage
from thoughtformer.rules import RowCounters, TokenStructure, VisibilityRule, summaries_of, with_summaries

__all__ = ["CachedStage", "cache_bytes", "cached_stages", "check_history", "most_entries", "new_cache"]


@dataclass(frozen=True)
class CachedStage:
    """What a cache holds of a stage: entries of a token, and of a sentence end."""

    name: str
    rule: VisibilityRule
    stage: Stage
    per_token: int
    per_end: int

    def shape(self, num_rows: int, dtype: torch.dtype) -> KVShape:
        """Of its keys and values."""
        layer = self.stage.shape
        return KVShape(
            num_layers=len(self.stage.layers),
            num_rows=num_rows,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            dtype=dtype,
        )


def cached_stages(stages: Sequence[Stage]) -> list[CachedStage]:
    """The stages' entries, in order, then those of the summaries that an hourglass's decoder reads."""
    cached = [CachedStage(stage.name, stage.rule, stage, stage.spec.per_token, stage.spec.per_end) for stage in stages]
    last, summaries = stages[-1], stages[-1].spec.summaries
    if summaries is not None:
        # Called memory on disk.
        cached.append(CachedStage("memory", summaries.rule, last, 0, summaries.per_end))
    return cached


def new_cache(cached: Sequence[CachedStage], num_rows: int, *, dtype: torch.dtype, device: torch.device) -> GPTHFCache:
    """An empty cache for `num_rows` rows."""
    stages = [
        StageCache(
            part.rule,
            part.shape(num_rows, dtype),
            device,
            name=part.name,
            per_token=part.per_token,
            per_end=part.per_end,
        )
        for part in cached
    ]
    return GPTHFCache(stages, num_rows)


def cache_bytes(
    cached: Sequence[CachedStage],
    longest_row_entries: dict[str, int],
    num_rows: int,
    reserve_tokens: int,
    dtype: torch.dtype,
) -> int:
    """What `num_bytes()` of a committed cache must be; knows block sizes and nothing of the tensors."""
    stages = sum(
        slots_bytes(
            len(FIELDS),
            max(longest_row_entries[part.name], reserve_tokens if part.rule.keeps_all else 0),
            part.shape(num_rows, dtype),
            block_entries=part.rule.block_entries,
            block_growth=part.rule.block_growth,
        )
        for part in cached
    )
    return stages + num_rows * 8 * 5  # four counters and the token count


def check_history(cached: Sequence[CachedStage], cache: GPTHFCache, tokens: TokenStructure) -> None:
    """Raises `ValueError` unless a cache of one row holds what the rules keep of these tokens, but for their values."""
    after = RowCounters.zeros(1).after(tokens)
    for field in fields(RowCounters):
        if not torch.equal(getattr(cache.counters, field.name), getattr(after, field.name)):
            raise ValueError(f"its counter of {field.name}s isn't that of its ids")
    if cache.num_tokens.tolist() != [len(tokens)]:
        raise ValueError(f"it counts {cache.num_tokens.tolist()} tokens, not {len(tokens)}")
    for part, stage in zip(cached, cache.stages, strict=True):
        if not part.per_token:
            _, entries = summaries_of(tokens, part.per_end)
        elif part.per_end > 1:
            _, entries = with_summaries(tokens, part.per_end)
        else:
            entries = tokens
        kept = entries[part.rule.keeps(entries, after)]
        expected = torch.stack([getattr(kept, name).long() for name in FIELDS])
        found = stage.entries[:, 0, : int(stage.lengths[0])].long()
        # Slots are in any order.
        if expected.shape != found.shape or not torch.equal(_sorted(expected), _sorted(found)):
            raise ValueError(f"what it holds of the stage {part.name!r} isn't what its ids leave there")


def _sorted(fields_of_entries: Int[Tensor, "fields entries"]) -> Int[Tensor, "fields entries"]:
    columns = sorted(map(tuple, fields_of_entries.T.tolist()))
    return torch.tensor(columns, dtype=torch.long).reshape(-1, len(FIELDS))


def most_entries(
    cached: Sequence[CachedStage], config: GPTHFConfig, prompt: Sequence[int], num_new_tokens: int
) -> dict[str, int]:
    """By stage, the most entries that a row holds between steps; see `GPTHFModel.most_entries`."""
    closing = (config.sentence_end_token_id, config.bos_token_id)
    total = len(prompt) + num_new_tokens
    ends = sum(token in closing for token in prompt) + (num_new_tokens + 1) // 2
    if config.max_sentence_tokens is None:
        open_sentence = total
    else:
        # A prompt may bring sentences that the model itself wouldn't write.
        open_sentence = min(max(_longest_sentence(prompt, closing), config.max_sentence_tokens), total)

    def entries(part: CachedStage) -> int:
        bound = part.rule.most_entries(num_tokens=total, num_ends=ends, longest_sentence=open_sentence)
        # Where tokens write as well, ends that write several entries are gone between steps: an encoder's.
        return bound if part.per_token else bound * part.per_end

    return {part.name: entries(part) for part in cached}


def _longest_sentence(ids: Sequence[int], closing: Sequence[int | None]) -> int:
    """Tokens of the longest sentence, its end included."""
    longest = length = 0
    for token in ids:
        length += 1
        longest = max(longest, length)
        if token in closing:
            length = 0
    return longest

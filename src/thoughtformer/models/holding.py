"""What a GPTHF holds while it writes: which stages keep entries, how many at most, and their bytes by formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from thoughtformer.attention import VisibilityRule
from thoughtformer.cache import GPTHFCache, StageCache, stage_bytes
from thoughtformer.models.configuration_gpthf import GPTHFConfig
from thoughtformer.models.stages import DecoderStage, Stage

__all__ = ["HeldStage", "cache_bytes", "held_stages", "most_entries", "new_cache"]


@dataclass(frozen=True)
class HeldStage:
    """What a cache holds of a stage: entries of a token, and of a sentence end."""

    name: str
    rule: VisibilityRule
    stage: Stage
    per_token: int
    per_end: int


def held_stages(config: GPTHFConfig, stages: Sequence[Stage]) -> list[HeldStage]:
    """The stages' entries, in order, then an hourglass's memory."""
    more = config.summaries_per_sentence
    is_hourglass = config.num_decoder_layers > 0
    per_token = {"encoder": (1, more), "body": (0, more) if is_hourglass else (1, 1), "decoder": (1, 1)}
    held = [HeldStage(stage.name, stage.rule, stage, *per_token[stage.name]) for stage in stages]
    if is_hourglass:
        decoder = cast(DecoderStage, stages[-1])
        held.append(HeldStage("memory", decoder.memory_rule, decoder, 0, more))
    return held


def new_cache(held: Sequence[HeldStage], num_rows: int, *, dtype: torch.dtype, device: torch.device) -> GPTHFCache:
    """An empty cache for `num_rows` rows."""
    stages = [
        StageCache(
            part.rule,
            name=part.name,
            per_token=part.per_token,
            per_end=part.per_end,
            num_layers=len(part.stage.layers),
            num_rows=num_rows,
            num_kv_heads=part.stage.shape.num_kv_heads,
            head_dim=part.stage.shape.head_dim,
            dtype=dtype,
            device=device,
        )
        for part in held
    ]
    return GPTHFCache(stages, num_rows)


def cache_bytes(
    held: Sequence[HeldStage],
    longest_row_entries: dict[str, int],
    num_rows: int,
    reserve_tokens: int,
    dtype: torch.dtype,
) -> int:
    """What `num_bytes()` of a committed cache must be; knows block sizes and nothing of the tensors."""
    stages = sum(
        stage_bytes(
            part.rule,
            num_layers=len(part.stage.layers),
            num_rows=num_rows,
            longest_row_entries=max(longest_row_entries[part.name], reserve_tokens if part.rule.keeps_all else 0),
            num_kv_heads=part.stage.shape.num_kv_heads,
            head_dim=part.stage.shape.head_dim,
            dtype=dtype,
        )
        for part in held
    )
    return stages + num_rows * 8 * 5  # four counters and the token count


def most_entries(config: GPTHFConfig, prompt: Sequence[int], num_new_tokens: int) -> dict[str, int]:
    """By stage, the most entries that a row holds between steps; see `GPTHFModel.most_entries`."""
    closing = (config.sentence_end_token_id, config.bos_token_id)
    total = len(prompt) + num_new_tokens
    ends = sum(token in closing for token in prompt) + (num_new_tokens + 1) // 2
    if config.max_sentence_tokens is None:
        open_sentence = total
    else:
        # A prompt may bring sentences that the model itself wouldn't write.
        open_sentence = min(max(_longest_sentence(prompt, closing), config.max_sentence_tokens), total)
    recent = min((config.recent_sentences + 1) * open_sentence, total)
    body = {"fast": ends, "keep_last": ends + recent, "hybrid": ends + recent, "causal": total}
    return {
        "encoder": open_sentence,
        "body": body[config.body_visibility] * config.summaries_per_sentence,
        "decoder": recent,
        "memory": ends * config.summaries_per_sentence,
    }


def _longest_sentence(ids: Sequence[int], closing: Sequence[int | None]) -> int:
    """Tokens of the longest sentence, its end included."""
    longest = length = 0
    for token in ids:
        length += 1
        longest = max(longest, length)
        if token in closing:
            length = 0
    return longest

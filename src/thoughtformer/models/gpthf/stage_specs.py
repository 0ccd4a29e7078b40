"""The stages that a flat configuration describes."""

from __future__ import annotations

from dataclasses import dataclass

from thoughtformer.attention.rotary import Rotary
from thoughtformer.models.gpthf.configuration import GPTHFConfig, LayerShape
from thoughtformer.rules import EarlierSentences, OwnSentence, TokenRule

__all__ = ["StageSpec", "SummarySpec", "stage_specs"]


@dataclass(frozen=True, kw_only=True)
class SummarySpec:
    """How a decoder reads summaries.

    Attributes:
        rule: which.
        positions: what the rotation between a token and a summary counts: a field of the structure; None for nothing.
        per_end: summaries of a sentence.
    """

    rule: EarlierSentences
    positions: str | None
    per_end: int


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """Layers that share a rule and positions.

    Attributes:
        name: `encoder`, `body` or `decoder`.
        rule: who may read whom.
        positions: what rotations count: a field of the structure.
        num_layers: at least 1.
        shape: of the layers.
        outer_size: width of what comes in and goes out.
        rotary: of queries and keys.
        per_token, per_end: entries that a cache holds of a token, and of a sentence end.
        summaries: what a decoder reads beside tokens.
    """

    name: str
    rule: TokenRule
    positions: str
    num_layers: int
    shape: LayerShape
    outer_size: int
    rotary: Rotary
    per_token: int = 1
    per_end: int = 1
    summaries: SummarySpec | None = None


def stage_specs(config: GPTHFConfig) -> list[StageSpec]:
    """The stages in the order that tokens pass them."""
    rotary = Rotary(config.head_dim, config.rope_theta)
    is_hourglass, per_end = config.num_decoder_layers > 0, config.summaries_per_sentence
    specs = []
    if config.num_encoder_layers:
        specs.append(
            StageSpec(
                name="encoder",
                rule=OwnSentence(),
                # Counting inside the sentence makes the encoder's output depend on the sentence alone.
                positions="offset",
                num_layers=config.num_encoder_layers,
                shape=config.layer_shape("encoder"),
                outer_size=config.hidden_size,
                rotary=rotary,
                per_end=per_end,
            )
        )
    rule = config.body_rule()
    specs.append(
        StageSpec(
            name="body",
            rule=rule,
            positions="position" if rule.counts_tokens or config.body_positions == "token" else "sentence",
            num_layers=config.num_body_layers,
            shape=config.layer_shape("body"),
            outer_size=config.hidden_size,
            rotary=rotary,
            per_token=0 if is_hourglass else 1,
            per_end=per_end,
        )
    )
    if is_hourglass:
        specs.append(
            StageSpec(
                name="decoder",
                rule=OwnSentence(config.recent_sentences),
                # Offsets are small, and so exact in half precision; across sentences only document positions tell
                # distances.
                positions="position" if config.recent_sentences else "offset",
                num_layers=config.num_decoder_layers,
                shape=config.layer_shape("decoder"),
                outer_size=config.hidden_size,
                rotary=rotary,
                summaries=SummarySpec(
                    rule=EarlierSentences(own=config.ends_read_own_summary),
                    positions="sentence" if config.memory_positions == "sentence" else None,
                    per_end=per_end,
                ),
            )
        )
    return specs

"""The rows: which architectures are compared, at which sizes, on how much text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from thoughtformer.errors import ConfigError, nearest
from thoughtformer.train.recipe import Recipe

__all__ = ["GROUPS", "SIZES", "VARIANTS", "Row", "rows_of"]

#: Widths, named by the parameters of six layers; embeddings of 8,192 ids come on top.
SIZES: dict[str, dict[str, int]] = {
    "1m": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2},
    "3m": {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3},
    "8m": {"hidden_size": 320, "intermediate_size": 896, "num_attention_heads": 5},
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An architecture: what it changes in a recipe, at any size.

    Attributes:
        model: keys of the model's shape.
        run: keys of the recipe.
        body_widths: the body's hidden and intermediate size, as multiples of the model's hidden size.
    """

    model: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)
    body_widths: tuple[float, float] | None = None

    def model_at(self, size: str) -> dict[str, Any]:
        """The model's shape at a size."""
        shape = {**SIZES[size], **self.model}
        if self.body_widths is not None:
            hidden, intermediate = (int(part * shape["hidden_size"]) for part in self.body_widths)
            shape |= {"body_hidden_size": hidden, "body_intermediate_size": intermediate}
        return shape


def _gpt(**run: Any) -> Variant:
    model = {"num_encoder_layers": 0, "num_body_layers": 6, "body_visibility": "causal"}
    return Variant(model=model, run=run)


def _gpthf(encoder: int, body: int, visibility: str, **model: Any) -> Variant:
    shape = {"num_encoder_layers": encoder, "num_body_layers": body, "body_visibility": visibility}
    return Variant(model=shape | model)


def _hourglass(encoder: int, body: int, decoder: int, **model: Any) -> Variant:
    shape = {"num_encoder_layers": encoder, "num_body_layers": body, "num_decoder_layers": decoder}
    return Variant(model={"body_visibility": "fast"} | shape | model)


def _of_length(shortest: int, longest: int) -> Variant:
    """An hourglass over sentences merged and split to an even length."""
    variant = _hourglass(2, 2, 2, max_sentence_tokens=longest)
    return replace(variant, run={"min_sentence_tokens": shortest})


#: The switches that paid in the screening.
TWO_REBUILT: dict[str, Any] = {"summaries_per_sentence": 2, "rebuild_loss_weight": 0.1}

VARIANTS: dict[str, Variant] = {
    "gpt": _gpt(sentence_ends=False),
    "gpt-ends": _gpt(),
    "fast-2-4": _gpthf(2, 4, "fast"),
    "keep_last-2-4": _gpthf(2, 4, "keep_last"),
    "hybrid-2-4": _gpthf(2, 4, "hybrid"),
    "hybrid-1-5": _gpthf(1, 5, "hybrid"),
    "hybrid-recent-1": _gpthf(2, 4, "hybrid", recent_sentences=1),
    "hourglass-2-2-2": _hourglass(2, 2, 2),
    "hourglass-1-2-3": _hourglass(1, 2, 3),
    "hourglass-3-2-1": _hourglass(3, 2, 1),
    "hourglass-1-1-4": _hourglass(1, 1, 4),
    "hourglass-own": _hourglass(2, 2, 2, ends_read_own_summary=True),
    "hourglass-unturned": _hourglass(2, 2, 2, memory_positions="none"),
    "hourglass-recent-1": _hourglass(2, 2, 2, recent_sentences=1),
    "hourglass-recent-2": _hourglass(2, 2, 2, recent_sentences=2),
    "hourglass-k2": _hourglass(2, 2, 2, summaries_per_sentence=2),
    "hourglass-k4": _hourglass(2, 2, 2, summaries_per_sentence=4),
    # One layer of twice the width instead of two, for about as many parameters.
    "hourglass-wide": replace(_hourglass(2, 1, 2), body_widths=(2, 1.25)),
    "hourglass-rebuild": _hourglass(2, 2, 2, rebuild_loss_weight=0.1),
    "hourglass-rebuild-0.3": _hourglass(2, 2, 2, rebuild_loss_weight=0.3),
    "hourglass-rebuild-recent-8": _hourglass(2, 2, 2, rebuild_loss_weight=0.1, recent_sentences=8),
    "hourglass-k2-rebuild": _hourglass(2, 2, 2, **TWO_REBUILT),
    "hourglass-k2-rebuild-recent-1": _hourglass(2, 2, 2, **TWO_REBUILT, recent_sentences=1),
    "hourglass-k2-rebuild-recent-4": _hourglass(2, 2, 2, **TWO_REBUILT, recent_sentences=4),
    "hybrid-rebuild": _gpthf(2, 4, "hybrid", rebuild_loss_weight=0.1),
    "hourglass-next": _hourglass(2, 2, 2, next_sentence_loss_weight=0.1),
    "hourglass-even-16": _of_length(12, 20),
    "hourglass-even-32": _of_length(24, 40),
    "hourglass-even-64": _of_length(48, 80),
    "hourglass-blocks-32": _of_length(32, 32),
    "hourglass-body-depths": _hourglass(2, 2, 2, body_reads_depths=True),
    "hourglass-decoder-depths": _hourglass(2, 2, 2, decoder_reads_depths=True),
}

#: The switches one by one, the likeliest first.
SCREENED = (
    "gpt",
    "gpt-ends",
    "fast-2-4",
    "hybrid-2-4",
    "hourglass-2-2-2",
    "hourglass-recent-1",
    "hourglass-k2",
    "hourglass-own",
    "hourglass-even-32",
    "hourglass-1-2-3",
    "hourglass-decoder-depths",
    "hourglass-rebuild",
    "hourglass-next",
    "hourglass-k4",
    "hourglass-body-depths",
    "hybrid-recent-1",
    "hourglass-k2-rebuild",
    "hybrid-rebuild",
    "hourglass-wide",
    "hourglass-3-2-1",
    "hourglass-rebuild-0.3",
    "hourglass-even-64",
    "hourglass-unturned",
    "hourglass-even-16",
    "hourglass-1-1-4",
    "keep_last-2-4",
    "hourglass-recent-2",
    "hourglass-blocks-32",
    "hybrid-1-5",
    "hourglass-k2-rebuild-recent-1",
    "hourglass-rebuild-recent-8",
)

#: What all are compared with.
BASELINE = "gpt"

#: The best on little text, on which models don't learn to copy.
BEST_WITHOUT_WINDOW = "hourglass-k2-rebuild"

#: The best on more text, and the default recipe's architecture.
BEST = "hourglass-rebuild-recent-8"

#: Those of the final rows, for which chance and size are looked at too.
FINALISTS = (BASELINE, "fast-2-4", "hybrid-rebuild", "hourglass-2-2-2", BEST_WITHOUT_WINDOW, BEST)


MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training: an architecture at a size, a learning rate, a seed, and an amount of text."""

    variant: str
    size: str = "1m"
    megabytes: int = 10
    learning_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("variant", self.variant, VARIANTS), ("size", self.size, SIZES)):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is unknown.{nearest(value, known)}")

    @property
    def name(self) -> str:
        """For folders and logs."""
        return f"{self.variant}_{self.size}_{self.megabytes}mb_lr{self.learning_rate:g}_seed{self.seed}"

    @property
    def workload(self) -> dict[str, Any]:
        """What identifies the row, beside its variant."""
        return {
            "size": self.size,
            "megabytes": self.megabytes,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def recipe(self) -> Recipe:
        """The training."""
        variant = VARIANTS[self.variant]
        return Recipe.from_dict(
            {
                "name": self.name,
                "model": variant.model_at(self.size),
                "max_bytes": self.megabytes * MEGABYTE,
                "learning_rate": self.learning_rate,
                "matrix_learning_rate": self.learning_rate,
                "seed": self.seed,
                "save_every_steps": 100,
                "log_every_steps": 50,
                **variant.run,
            }
        )


#: The rate of the screening and of the final rows: the best of those tried for GPT and hybrid alike.
LEARNING_RATE = 8e-3


def _learning_rates() -> list[Row]:
    return [
        Row(variant=variant, learning_rate=rate)
        for rate in (4e-3, 8e-3, 16e-3)
        for variant in ("gpt", "hybrid-2-4", "hourglass-2-2-2")
    ]


def _screen() -> list[Row]:
    return [Row(variant=variant, learning_rate=LEARNING_RATE) for variant in SCREENED]


def _seeds(size: str, megabytes: int = 10) -> list[Row]:
    return [
        Row(variant=variant, size=size, megabytes=megabytes, learning_rate=LEARNING_RATE, seed=seed)
        for seed in (0, 1, 2)
        for variant in FINALISTS
    ]


def _long() -> list[Row]:
    """The finalists, and a narrower window: with so much text models learn to copy from what they can read."""
    narrower = [
        Row(variant="hourglass-k2-rebuild-recent-4", megabytes=40, learning_rate=LEARNING_RATE, seed=seed)
        for seed in (0, 1, 2)
    ]
    return [*_seeds("1m", 40), *narrower]


def _equal_flops() -> list[Row]:
    """Hourglasses on as much text as takes them the training FLOPs of the plain GPT's 40 MB."""
    return [
        Row(variant=variant, megabytes=megabytes, learning_rate=LEARNING_RATE, seed=seed)
        for seed in (0, 1, 2)
        for variant, megabytes in ((BASELINE, 40), (BEST_WITHOUT_WINDOW, 58), (BEST, 54))
    ]


def _largest() -> list[Row]:
    return [
        Row(variant=variant, size="8m", learning_rate=LEARNING_RATE)
        for variant in (BASELINE, BEST_WITHOUT_WINDOW, BEST)
    ]


def _trial() -> list[Row]:
    """To see the runner at work, minutes a row; so little text says nothing of architectures."""
    return [Row(variant=variant, megabytes=1, learning_rate=LEARNING_RATE) for variant in (BASELINE, BEST)]


#: Rows by what they are for; a row may be in several.
GROUPS: dict[str, Callable[[], list[Row]]] = {
    "learning-rates": _learning_rates,
    "screen": _screen,
    "seeds-1m": partial(_seeds, "1m"),
    "seeds-3m": partial(_seeds, "3m"),
    "long": _long,
    "equal-flops": _equal_flops,
    "largest": _largest,
    "trial": _trial,
}


def rows_of(group: str) -> list[Row]:
    """A group's rows; raises `ConfigError`."""
    if group not in GROUPS:
        raise ConfigError(f"no group of rows {group!r}.{nearest(group, GROUPS)}")
    return GROUPS[group]()

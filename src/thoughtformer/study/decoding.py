"""What writing costs the study's finalists, at their own shapes: random weights cost what trained ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from thoughtformer.bench.architectures import Work, compared
from thoughtformer.bench.records import Record
from thoughtformer.errors import ConfigError, nearest
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.linear import pack_weights
from thoughtformer.study.rows import FINALISTS, SIZES, Row

__all__ = ["CASES", "DecodingOptions"]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How to measure.

    Attributes:
        size: of `rows.SIZES`.
        context: tokens that every row holds when it starts to write.
        batches: rows written together.
        compiles: also measure one row with compiled steps.
        on_progress: told what runs.
    """

    size: str
    context: int = 4096
    repeats: int = 5
    batches: tuple[int, ...] = (1, 16)
    compiles: bool = True
    on_progress: Callable[[str], None] = field(default=lambda text: None)

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"size {self.size!r} is unknown.{nearest(self.size, SIZES)}")


def finalists(options: DecodingOptions) -> Iterator[Record]:
    """Tokens a second, FLOPs a token, and bytes of keys and values."""
    models = {name: _untrained(name, options) for name in FINALISTS}
    layers = sum(len(stage.layers) for stage in models["gpt"].model.stages)  # type: ignore[arg-type]
    for batch in options.batches:
        yield from compared(
            "finalists",
            models,
            Work(size=options.size, layers=layers, batch=batch, context=options.context, sentences=2),
            repeats=options.repeats,
            compiles=("",) if options.compiles and batch == 1 else (),
            on_progress=options.on_progress,
        )


def _untrained(variant: str, options: DecodingOptions) -> GPTHFForCausalLM:
    """A variant's model, with room for the context, which its training text need not have."""
    recipe = Row(variant=variant, size=options.size).recipe()
    config = recipe.model_config(vocab_size=8192, start=0, end=1, padding=2)
    config.max_position_embeddings = 2 * options.context
    torch.manual_seed(0)
    model = GPTHFForCausalLM(config).eval()
    pack_weights(model)
    return model


CASES: dict[str, Callable[[DecodingOptions], Iterator[Record]]] = {"finalists": finalists}

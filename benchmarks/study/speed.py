"""What writing and training cost the study's finalists, at their own shapes, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.study.rows import BASELINE, FINALISTS, SIZES, Row
from thoughtformer.bench.architectures import Work, compared
from thoughtformer.bench.records import Record
from thoughtformer.bench.running import measured, regular_text
from thoughtformer.bench.shapes import SENTENCE_TOKENS
from thoughtformer.bench.timing import Run, seconds_of
from thoughtformer.errors import ConfigError, nearest
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.packed_linear import pack_weights
from thoughtformer.train.arguments import bf16_pays
from thoughtformer.train.recipe import Recipe
from thoughtformer.train.trainer import recipe_optimizer

__all__ = ["CASES", "StudySpeed"]


@dataclass(frozen=True, kw_only=True)
class StudySpeed:
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


def decoding(options: StudySpeed) -> Iterator[Record]:
    """Text tokens a second, FLOPs a token, and bytes of keys and values."""
    models = {name: _untrained(name, options) for name in FINALISTS}
    for model in models.values():
        pack_weights(model.eval())
    layers = sum(len(stage.layers) for stage in models[BASELINE].model.stages)  # type: ignore[arg-type]
    for batch in options.batches:
        yield from compared(
            "finalists",
            models,
            Work(size=options.size, layers=layers, batch=batch, context=options.context, sentences=2),
            repeats=options.repeats,
            compiles=("",) if options.compiles and batch == 1 else (),
            on_progress=options.on_progress,
        )


def training(options: StudySpeed) -> Iterator[Record]:
    """Text tokens a second of whole training steps, the optimiser's part among them."""
    recipe = _recipe(BASELINE, options)
    workload = {"size": options.size, "rows": recipe.rows_per_step, "row_tokens": recipe.row_tokens}
    yield from measured(
        "training",
        workload,
        {name: _step(_recipe(name, options), _untrained(name, options)) for name in FINALISTS},
        {},
        repeats=options.repeats,
        on_run=lambda name, number: options.on_progress(f"training {name}, round {number}"),
    )


def _step(recipe: Recipe, model: GPTHFForCausalLM) -> Run:
    """One step on a batch of regular text, as `train` does it."""
    optimizer = recipe_optimizer(recipe, model.train())
    ids = torch.tensor([regular_text(model, recipe.row_tokens)] * recipe.rows_per_step)
    # A plain GPT needs no sentence ends: all it reads is text.
    text = ids.numel() * (1 if not recipe.sentence_ends else 1 - 1 / SENTENCE_TOKENS)

    def work() -> None:
        for rows in ids.split(recipe.rows_per_batch):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16_pays(recipe.precision)):
                loss = model(rows, labels=rows, loss_only=True).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: {"text_tokens_per_second": text / seconds_of(work)}


def _recipe(variant: str, options: StudySpeed) -> Recipe:
    return Row(variant=variant, size=options.size).recipe()


def _untrained(variant: str, options: StudySpeed) -> GPTHFForCausalLM:
    """A variant's model, with room for the context, which its training text need not have."""
    recipe = _recipe(variant, options)
    config = recipe.model_config(vocab_size=8192, start=0, end=1, padding=2)
    config.max_position_embeddings = max(2 * options.context, recipe.row_tokens)
    torch.manual_seed(0)
    return GPTHFForCausalLM(config)


CASES: dict[str, Callable[[StudySpeed], Iterator[Record]]] = {"finalists": decoding, "training": training}

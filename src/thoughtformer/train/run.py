"""The training entry: recipe and data in, a model folder out. The same under torchrun, by way of accelerate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed

from thoughtformer.errors import CorpusError
from thoughtformer.files import sealed_json
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.loading import load_tokenizer
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.packing import PackedRows, TokenisedCorpus
from thoughtformer.text.tokenizer import SentenceTokenizer
from thoughtformer.train.arguments import hardware, training_arguments
from thoughtformer.train.folder import RESULT_FILE, finished_result, prepare_output, same_data, written_whole
from thoughtformer.train.recipe import Recipe
from thoughtformer.train.settings import TrainingPlan
from thoughtformer.train.trainer import ProgressCallback, SentenceTrainer

__all__ = ["TrainingResult", "recipe_tokenizer", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished run did; also in the output folder's training.json.

    `mean_loss` is over all steps since the start or the last resume, `last_loss` over the last log interval.
    """

    steps: int
    tokens: int
    corpus_tokens: int
    corpus_bytes: int
    documents: int
    parameters: int
    mean_loss: float
    last_loss: float | None
    seconds: float
    hardware: str
    versions: dict[str, str]


def train(
    recipe: Recipe,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    column: str = "text",
    encoding: str = "utf-8",
    on_tokenised: Callable[[int, int], None] | None = None,
    on_start: Callable[[TrainingPlan], None] | None = None,
) -> TrainingResult:
    """Trains a model and writes it, its tokenizer and its recipe to `out`.

    Checkpoints go to `out/checkpoint-*`, each whole or absent, and logs for TensorBoard to `out/logs`.

    Args:
        recipe: the run.
        data: sources as `Corpus` takes them.
        out: a new or empty folder, unless `resume` or `overwrite` is set.
        resume: go on from the last checkpoint in `out`, with exactly the steps that would have followed; of a finished
            run, nothing is done.
        overwrite: remove the run that is in `out`.
        column: where records of .jsonl, .parquet and `datasets` hold their text.
        encoding: of text files.
        on_tokenised: told of each tokenised document: how many so far, and its bytes.
        on_start: told what the run is going to do, when the text is ready and training starts.

    Raises:
        OutputError: `out` holds something already, or the disk is full.
        CorpusError, ConfigError, TokenizerError: the data, the recipe, or the tokenizer can't be used.
    """
    out = Path(out)
    # Whatever can be refused is, before anything in the folder changes.
    corpus = Corpus(sources=list(data), column=column, max_bytes=recipe.max_bytes, encoding=encoding)
    tokenizer = recipe_tokenizer(recipe)
    config = _model_config(recipe, tokenizer)
    arguments = training_arguments(recipe, out)
    checkpoint = prepare_output(out, recipe, resume=resume, overwrite=overwrite)
    with arguments.main_process_first(desc="tokenising"):
        tokens = TokenisedCorpus.build(corpus, tokenizer, on_progress=on_tokenised)
    rows = PackedRows(tokens, recipe.row_tokens)
    rows_at_once = recipe.rows_per_batch * arguments.world_size
    if len(rows) < rows_at_once:
        raise CorpusError(
            f"the data makes {len(rows)} rows of {recipe.row_tokens} tokens, but {rows_at_once} are computed at once. "
            "Give more text, or lower rows_per_batch and rows_per_step, or row_tokens."
        )
    same_data(out, tokens, resume=resume, is_first=arguments.should_save)
    done = finished_result(out) if resume else None
    if done is not None:
        return TrainingResult(**done)
    set_seed(recipe.seed)
    model = GPTHFForCausalLM(config)
    trainer = SentenceTrainer(
        recipe,
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[ProgressCallback(recipe.rows_per_step * recipe.row_tokens)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if on_start is not None:
        device = str(arguments.device)
        on_start(recipe.plan(model, device=device, corpus_tokens=len(tokens.tokens), num_rows=len(rows)))
    started = time.monotonic()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.wait_for_everyone()
    result = TrainingResult(
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * recipe.rows_per_step * recipe.row_tokens,
        corpus_tokens=len(tokens.tokens),
        corpus_bytes=int(tokens.num_bytes.sum()),
        documents=len(tokens),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mean_loss=outcome.training_loss,
        last_loss=next((line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line), None),
        seconds=time.monotonic() - started,
        hardware=hardware(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    if trainer.args.should_save:
        _write_model(out, model, tokenizer, result)
    return result


def recipe_tokenizer(recipe: Recipe) -> SentenceTokenizer:
    """The tokenizer that a recipe names, set as it says."""
    return load_tokenizer(
        recipe.tokenizer,
        insert_sentence_ends=recipe.sentence_ends,
        max_sentence_tokens=recipe.model.max_sentence_tokens,
        min_sentence_tokens=recipe.min_sentence_tokens,
    )


def _model_config(recipe: Recipe, tokenizer: SentenceTokenizer) -> Any:
    start, end, padding = tokenizer.bos_token_id, tokenizer.sentence_end_token_id, tokenizer.pad_token_id
    assert isinstance(start, int)
    assert isinstance(padding, int)
    return recipe.model_config(vocab_size=len(tokenizer), start=start, end=end, padding=padding)


def _write_model(out: Path, model: GPTHFForCausalLM, tokenizer: SentenceTokenizer, result: TrainingResult) -> None:
    model.config.use_cache = True  # the Trainer turns it off
    with written_whole(out) as draft:
        model.save_pretrained(draft)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(str(draft))
        (draft / RESULT_FILE).write_text(sealed_json(result.__dict__), encoding="utf-8")

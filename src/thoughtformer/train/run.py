"""The training entry: recipe and data in, a model folder out. The same under torchrun, by way of accelerate."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from thoughtformer.errors import ConfigError, CorpusError, OutputError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.loading import load_tokenizer
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.packing import PackedRows, TokenisedCorpus
from thoughtformer.text.tokenizer import SentenceTokenizer
from thoughtformer.train.recipe import Recipe
from thoughtformer.train.trainer import CHECKPOINTS_KEPT, DRAFT_FOLDER, ProgressCallback, SentenceTrainer

__all__ = ["TrainingResult", "train"]

RECIPE_FILE = "recipe.json"
RESULT_FILE = "training.json"
DATA_FILE = "data.json"


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
    on_tokenised: Callable[[int, int], None] | None = None,
    on_start: Callable[[], None] | None = None,
) -> TrainingResult:
    """Trains a model and writes it, its tokenizer and its recipe to `out`.

    Checkpoints go to `out/checkpoint-*`, each whole or absent, and logs for TensorBoard to `out/logs`.

    Args:
        recipe: the run.
        data: sources as `Corpus` takes them.
        out: a new or empty folder, unless `resume` or `overwrite` is set.
        resume: go on from the last checkpoint in `out`, with exactly the steps that would have followed.
        overwrite: remove the run that is in `out`.
        column: where records of .jsonl, .parquet and `datasets` hold their text.
        on_tokenised: told of each tokenised document: how many so far, and its bytes.
        on_start: told when the text is ready and training starts.

    Raises:
        OutputError: `out` holds something already, or the disk is full.
        CorpusError, ConfigError, TokenizerError: the data, the recipe, or the tokenizer can't be used.
    """
    out = Path(out)
    # Whatever can be refused is, before anything in the folder changes.
    corpus = Corpus(sources=list(data), column=column, max_bytes=recipe.max_bytes)
    tokenizer = load_tokenizer(
        recipe.tokenizer,
        insert_sentence_ends=recipe.sentence_ends,
        max_sentence_tokens=recipe.model.max_sentence_tokens,
    )
    config = _model_config(recipe, tokenizer)
    arguments = _arguments(recipe, out)
    checkpoint = _prepare_output(out, recipe, resume=resume, overwrite=overwrite)
    with arguments.main_process_first(desc="tokenising"):
        tokens = TokenisedCorpus.build(corpus, tokenizer, on_progress=on_tokenised)
    rows = PackedRows(tokens, recipe.row_tokens)
    rows_at_once = recipe.rows_per_batch * arguments.world_size
    if len(rows) < rows_at_once:
        raise CorpusError(
            f"the data makes {len(rows)} rows of {recipe.row_tokens} tokens, but {rows_at_once} are computed at once. "
            "Give more text, or lower rows_per_batch and rows_per_step, or row_tokens."
        )
    _same_data(out, tokens, resume=checkpoint is not None, is_first=arguments.should_save)
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
        on_start()
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
        hardware=_hardware(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    if trainer.args.should_save:
        _write_model(out, model, tokenizer, result)
    return result


def _model_config(recipe: Recipe, tokenizer: SentenceTokenizer) -> Any:
    start, end, padding = tokenizer.bos_token_id, tokenizer.sentence_end_token_id, tokenizer.pad_token_id
    assert isinstance(start, int)
    assert isinstance(padding, int)
    return recipe.model_config(vocab_size=len(tokenizer), start=start, end=end, padding=padding)


def _arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.rows_per_step % (recipe.rows_per_batch * processes):
        raise ConfigError(
            f"rows_per_step={recipe.rows_per_step} is not a multiple of rows_per_batch={recipe.rows_per_batch} times "
            f"{processes} processes. Lower rows_per_batch with --set rows_per_batch=N."
        )
    use_cpu = not torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "logs")  # transformers' way to say where
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=recipe.rows_per_batch,
        gradient_accumulation_steps=recipe.rows_per_step // (recipe.rows_per_batch * processes),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps if recipe.max_steps is not None else -1,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_fraction},
        warmup_steps=recipe.warmup_fraction,
        learning_rate=recipe.learning_rate,
        max_grad_norm=recipe.max_grad_norm,
        bf16=_bf16_pays(recipe.precision),
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False if processes > 1 else None,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_drop_last=True,
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        logging_steps=recipe.log_every_steps,
        save_steps=recipe.save_every_steps,
        save_total_limit=CHECKPOINTS_KEPT,
        report_to="tensorboard",
        disable_tqdm=True,
        log_level="error",
    )


def _bf16_pays(precision: str) -> bool:
    """Whether to run under bf16 autocast: on CPUs only with instructions for it, else it is slower than fp32."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


def _prepare_output(out: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> str | None:
    """Makes the folder ready; returns the checkpoint to resume from."""
    if resume and overwrite:
        raise OutputError("--resume and --overwrite exclude each other: go on with the run, or remove it.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder.")
    is_used = out.is_dir() and any(out.iterdir())
    holds_run = (out / RECIPE_FILE).exists()
    if int(os.environ.get("RANK", "0")) != 0:
        return get_last_checkpoint(str(out)) if resume and out.is_dir() else None
    if is_used and overwrite:
        if not holds_run:
            raise OutputError(f"{out} holds files, but no training run to overwrite. Give an empty folder.")
        for path in _run_files(out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif is_used and not resume:
        raise OutputError(
            f"{out} is not empty. Go on with --resume, replace its run with --overwrite, or name another."
        )
    elif resume:
        checkpoint = get_last_checkpoint(str(out)) if out.is_dir() else None
        if checkpoint is None:
            raise OutputError(f"{out} holds no checkpoint to resume from.")
        _same_recipe(out, recipe)
        return checkpoint
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RECIPE_FILE).write_text(recipe.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"can't write to {out}: {error}") from None
    return None


def _same_data(out: Path, tokens: TokenisedCorpus, *, resume: bool, is_first: bool) -> None:
    """Remembers which token file the run reads, or refuses to resume on another."""
    file = out / DATA_FILE
    identity = {"tokens": len(tokens.tokens), "documents": len(tokens), "key": tokens.folder.name}
    if resume:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise OutputError(f"can't read {file}, which says what the run was trained on: {error}") from None
        if before != identity:
            raise OutputError(
                f"the run in {out} reads other data: it had {before.get('documents')} documents of "
                f"{before.get('tokens')} tokens, these are {identity['documents']} of {identity['tokens']}, or their "
                "files have changed."
            )
    elif is_first:
        file.write_text(json.dumps(identity) + "\n", encoding="utf-8")


def _run_files(out: Path) -> Iterator[Path]:
    names = {RECIPE_FILE, RESULT_FILE, DATA_FILE, "logs", DRAFT_FOLDER, "config.json", "generation_config.json"}
    names |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    return (path for path in list(out.iterdir()) if path.name in names or path.name.startswith("checkpoint-"))


def _same_recipe(out: Path, recipe: Recipe) -> None:
    """Refuses to resume with another recipe; how often to log and save may change."""
    try:
        before = json.loads((out / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise OutputError(f"can't read {out / RECIPE_FILE}, the recipe to resume: {error}") from None
    now = recipe.to_dict()
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in ("log_every_steps", "save_every_steps")
    ]
    if differing:
        raise OutputError(f"the run in {out} has another recipe: {'; '.join(differing)}.")


def _write_model(out: Path, model: GPTHFForCausalLM, tokenizer: SentenceTokenizer, result: TrainingResult) -> None:
    draft = out / DRAFT_FOLDER
    shutil.rmtree(draft, ignore_errors=True)
    model.config.use_cache = True  # the Trainer turns it off
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(str(draft))
        (draft / RESULT_FILE).write_text(json.dumps(result.__dict__, indent=2) + "\n", encoding="utf-8")
        for path in draft.iterdir():
            path.replace(out / path.name)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"couldn't write the model to {out}: {error}. Its checkpoints are whole; make room and go on with --resume."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)

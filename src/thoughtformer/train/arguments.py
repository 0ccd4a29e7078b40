"""transformers' training arguments for a run, and what it runs on."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch
from transformers import TrainingArguments

from thoughtformer.errors import ConfigError
from thoughtformer.train.settings import RunSettings
from thoughtformer.train.trainer import CHECKPOINTS_KEPT

__all__ = ["bf16_pays", "hardware", "training_arguments"]


def training_arguments(recipe: RunSettings, out: Path) -> TrainingArguments:
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
        bf16=bf16_pays(recipe.precision),
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


def bf16_pays(precision: str) -> bool:
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


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"

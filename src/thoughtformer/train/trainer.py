"""transformers' Trainer with this project's loss, logs and checkpoints."""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from thoughtformer.errors import OutputError, UnsupportedError
from thoughtformer.files import seal
from thoughtformer.train.optimizer import build_optimizer
from thoughtformer.train.recipe import Recipe

__all__ = [
    "CHECKPOINTS_KEPT",
    "DRAFT_FOLDER",
    "ProgressCallback",
    "SentenceTrainer",
    "WholeCheckpointTrainer",
    "recipe_optimizer",
]

CHECKPOINTS_KEPT = 2
DRAFT_FOLDER = ".writing"


class WholeCheckpointTrainer(Trainer):
    """transformers' Trainer, of whose checkpoints each exists whole or not at all."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._is_drafting = False

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """As transformers', but a checkpoint at `max_steps` is the end, and not followed by one step more."""
        if resume_from_checkpoint is not None and self.args.max_steps > 0:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                losses = [line["loss"] for line in state.log_history if "loss" in line]
                return TrainOutput(state.global_step, losses[-1] if losses else math.nan, {})
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / DRAFT_FOLDER) if self._is_drafting else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a draft beside the checkpoints and renames it once whole."""
        out = Path(self.args.output_dir or "")
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(out / DRAFT_FOLDER, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_drafting = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(out / DRAFT_FOLDER / name)
                shutil.rmtree(out / name, ignore_errors=True)
                (out / DRAFT_FOLDER / name).rename(out / name)
        # A full disk is a RuntimeError to torch, and an exception of its own to safetensors.
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = sorted(path.name for path in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
            raise OutputError(
                f"couldn't write {name} to {out}: {error}. Kept whole: {', '.join(kept) or 'no checkpoint yet'}. "
                "Make room and go on with --resume."
            ) from error
        finally:
            self._is_drafting = False
            if self.args.should_save:
                shutil.rmtree(out / DRAFT_FOLDER, ignore_errors=True)
        if self.args.should_save:
            rotate_checkpoints(output_dir=str(out), save_total_limit=CHECKPOINTS_KEPT)


def recipe_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimiser that a recipe names, over all of a model's parameters."""
    return build_optimizer(
        model,
        kind=recipe.optimizer,
        learning_rate=recipe.learning_rate,
        matrix_learning_rate=recipe.matrix_learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
    )


class SentenceTrainer(WholeCheckpointTrainer):
    """Trains on packed rows; logs real tokens and sentence ends apart."""

    def __init__(self, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.sums = torch.zeros(4, dtype=torch.float64)  # loss and count of real tokens, then of sentence ends

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimiser."""
        if self.optimizer is None:
            assert self.model is not None
            if self.recipe.optimizer == "muon" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                raise UnsupportedError(
                    "optimizer='muon' turns whole matrices, which FSDP and DeepSpeed shard: it would be silently "
                    "wrong. Train with --set optimizer=adamw, or without sharding."
                )
            self.optimizer = recipe_optimizer(self.recipe, self.model)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss over the step's tokens, by the model's chunked head."""
        outputs = model(**inputs, loss_only=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._add(inputs["labels"][:, 1:], outputs.token_losses.detach())
        loss = outputs.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradient is averaged over processes again
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss of real tokens and of sentence ends since the last line, over all processes."""
        if "loss" in logs:
            reduced = self.accelerator.reduce(self.sums.to(self.args.device), reduction="sum")
            assert isinstance(reduced, torch.Tensor)
            sums = reduced.tolist()
            self.sums.zero_()
            logs["loss_tokens"] = sums[0] / max(sums[1], 1)
            if sums[3]:
                logs["loss_sentence_ends"] = sums[2] / sums[3]
        super().log(logs, start_time)

    def _add(self, labels: torch.Tensor, losses: torch.Tensor) -> None:
        end: int | None = self.model.config.sentence_end_token_id  # type: ignore[union-attr, assignment]
        is_end = torch.zeros_like(labels, dtype=torch.bool) if end is None else torch.eq(labels, end)
        is_token = (labels != -100) & ~is_end
        parts = [losses[is_token].sum(), is_token.sum(), losses[is_end].sum(), is_end.sum()]
        self.sums += torch.stack([part.double().cpu() for part in parts])


class ProgressCallback(TrainerCallback):
    """One line a log interval on standard error: step, losses, tokens/s, time left."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.console = Console(file=sys.stderr, highlight=False)
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step == self.first_step + 1:
            seconds = time.monotonic() - self.started
            left = seconds * (state.max_steps - state.global_step)
            self.console.print(f"step {state.global_step}/{state.max_steps} took {seconds:.1f} s: {_hours(left)} left")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        seconds = time.monotonic() - self.started
        per_step = seconds / max(state.global_step - self.first_step, 1)
        left = per_step * (state.max_steps - state.global_step)
        shown = {"tokens": "loss_tokens", "ends": "loss_sentence_ends", "removed": "removed"}
        parts = "".join(f"  {label} {logs[name]:.3f}" for label, name in shown.items() if name in logs)
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}{parts}  "
            f"{self.tokens_per_step / per_step:,.0f} tokens/s  {_hours(left)} left"
        )


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

"""Training a sentinel adapter: a base model and data in, an adapter's folder out. The same under torchrun."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import set_seed
from transformers.modeling_outputs import CausalLMOutput

from thoughtformer.compression.adapter import SentinelAdapter
from thoughtformer.compression.at_once import AttendAtOnce
from thoughtformer.compression.methods.sentinel import Sentinel
from thoughtformer.compression.model import CompressedModel
from thoughtformer.errors import ContextOverflowError, CorpusError
from thoughtformer.files import sealed_json
from thoughtformer.models.backbone import Backbone, backbone_of
from thoughtformer.models.chunked_loss import chunked_cross_entropy
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.models.loading import load
from thoughtformer.rules.entries import Entries
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.packing import TokenisedCorpus
from thoughtformer.text.plain import document_tokenizer
from thoughtformer.train.adapter_rows import AdapterRecipe, DocumentRows, FoldingCollator
from thoughtformer.train.arguments import hardware, training_arguments
from thoughtformer.train.folder import RESULT_FILE, finished_result, prepare_output, same_data, written_whole
from thoughtformer.train.settings import TrainingPlan
from thoughtformer.train.trainer import ProgressCallback, WholeCheckpointTrainer

__all__ = ["AdapterTraining", "AdapterTrainingResult", "train_adapter"]

STATE_FILE = "adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterTrainingResult:
    """What a finished run did; also in the output folder's training.json.

    Fractions removed are means over the rows: asked for, reached at the end of each, and on average over its tokens.
    """

    steps: int
    rows: int
    corpus_tokens: int
    trained_parameters: int
    mean_loss: float
    last_loss: float | None
    nominal_removed: float
    achieved_removed: float
    average_removed: float
    seconds: float
    hardware: str
    versions: dict[str, str]


class AdapterTraining(nn.Module):
    """What the Trainer sees: the loss of a batch; only the adapter learns."""

    def __init__(self, compressed: CompressedModel, teacher_weight: float) -> None:
        super().__init__()
        assert compressed.adapter is not None
        self.compressed = compressed
        self.teacher_weight = teacher_weight
        for parameter in compressed.model.parameters():
            parameter.requires_grad_(False)  # a model without LoRA is not frozen by peft
        self.adapter_parameters = compressed.adapter.trainable()
        for parameter in self.adapter_parameters:
            parameter.requires_grad_(True)

    def forward(
        self,
        input_ids: Tensor,
        entries: Tensor,
        labels: Tensor,
        removed: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """The mean loss over scored tokens, or their sum over `num_items_in_batch`."""
        compressed = self.compressed
        backbone, adapter = compressed.backbone, cast(SentinelAdapter, compressed.adapter)
        layout = Entries(*entries.cpu())
        attend = AttendAtOnce(
            layout,
            None,
            has_events=True,
            execution="gathered",
            see_earlier=adapter.config.see_earlier,
        )
        hidden = compressed.run(input_ids, layout.position, attend)
        scored = labels != -100
        count = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        states, targets = hidden[scored], labels[scored]
        loss = states.new_zeros(())
        if self.teacher_weight < 1:
            weights = torch.full_like(targets, 1.0, dtype=torch.float32) / count
            loss = loss + (1 - self.teacher_weight) * _cross_entropy(backbone, states, targets, weights)
        if self.teacher_weight:
            divergence = self._divergence(input_ids, layout, scored, states) / count
            loss = loss + self.teacher_weight * divergence
        return CausalLMOutput(loss=loss)

    def _divergence(self, input_ids: Tensor, layout: Entries, scored: Tensor, states: Tensor) -> Tensor:
        """KL(base without compression || compressed), summed over the scored tokens."""
        backbone = self.compressed.backbone
        is_token = (layout.order == 0).to(input_ids.device)
        count = is_token.sum(dim=1)
        width = int(count.max())
        where = torch.arange(width, device=input_ids.device) < count[:, None]
        ids = torch.zeros(len(input_ids), width, dtype=torch.long, device=input_ids.device)
        ids[where] = input_ids[is_token]
        positions = torch.arange(width, device=input_ids.device).expand_as(ids)

        def plain(layer: int, query: Tensor, key: Tensor, value: Tensor, *, original: Any, **_: Any) -> Tensor:
            return original(query, key, value, None)  # rows are padded at the end, where causal attention ignores it

        was_training = self.compressed.training
        self.compressed.eval()
        with torch.no_grad():
            hidden = backbone.forward(backbone.embed(ids), positions, plain)  # LoRA doesn't act unless told so
            padded = states.new_zeros(*input_ids.shape, hidden.shape[-1])
            padded[is_token] = hidden[where].to(padded.dtype)
            target = backbone.logits(padded[scored]).float().log_softmax(dim=-1)
        self.compressed.train(was_training)
        logits = backbone.logits(states).float().log_softmax(dim=-1)
        return F.kl_div(logits, target, reduction="sum", log_target=True)

    def state(self) -> dict[str, Tensor]:
        """The adapter's parameters, by name."""
        adapter = cast(SentinelAdapter, self.compressed.adapter)
        return {"rows": adapter.rows.detach(), **adapter.lora_state()}


def _cross_entropy(
    backbone: Backbone,
    states: Float[Tensor, "scored hidden"],
    targets: Tensor,
    weights: Float[Tensor, " scored"],
) -> Tensor:
    head = backbone.head()
    if isinstance(head, nn.Linear) and head.bias is None and backbone.head_is_all:
        return chunked_cross_entropy(states, head.weight, targets, weights, lambda logits, part: None)[0]
    return (F.cross_entropy(backbone.logits(states).float(), targets, reduction="none") * weights).sum()


class AdapterTrainer(WholeCheckpointTrainer):
    """Saves the adapter alone; logs the fractions removed."""

    def __init__(self, recipe: AdapterRecipe, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.removed = torch.zeros(4, dtype=torch.float64)  # nominal, achieved, average, rows, since the last log line
        self.removed_in_all = torch.zeros(4, dtype=torch.float64)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, with a learning rate of their own for the sentinels' rows."""
        if self.optimizer is None:
            training = cast(AdapterTraining, self.model)
            rows, *lora = training.adapter_parameters
            groups = [{"params": [rows], "lr": self.recipe.rows_learning_rate, "weight_decay": 0.0}]
            if lora:
                groups.append({"params": lora, "weight_decay": self.recipe.weight_decay})
            self.optimizer = torch.optim.AdamW(groups, lr=self.recipe.learning_rate, betas=(0.9, 0.98))
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's part of the step's mean loss."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        removed = inputs["removed"].double().cpu()
        self.removed += torch.cat([removed.sum(dim=0), torch.tensor([float(len(removed))], dtype=torch.float64)])
        loss = outputs.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean fractions removed since the last line."""
        if "loss" in logs and self.removed[3] > 0:
            self._take_sums(logs)
        super().log(logs, start_time)

    def _take_sums(self, logs: dict[str, float]) -> None:
        reduced = cast(Tensor, self.accelerator.reduce(self.removed.to(self.args.device), reduction="sum")).cpu()
        nominal, achieved, average, rows = reduced.tolist()
        logs |= {"removed_nominal": nominal / rows, "removed": achieved / rows, "removed_average": average / rows}
        self.removed_in_all += reduced.to(torch.float64)
        self.removed.zero_()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        training = cast(AdapterTraining, self.accelerator.unwrap_model(self.model))
        save_file({name: tensor.contiguous().cpu() for name, tensor in training.state().items()}, folder / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        training = cast(AdapterTraining, self.model)
        state = load_file(Path(resume_from_checkpoint) / STATE_FILE)
        with torch.no_grad():
            for name, tensor in training.state().items():
                tensor.copy_(state[name])


def train_adapter(
    recipe: AdapterRecipe,
    base: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    column: str = "text",
    encoding: str = "utf-8",
    half: bool = False,
    on_tokenised: Callable[[int, int], None] | None = None,
    on_start: Callable[[TrainingPlan], None] | None = None,
) -> AdapterTrainingResult:
    """Trains sentinels for a base model and writes the adapter and its recipe to `out`.

    Arguments and errors as for `train`, and those of a model that can't be compressed.

    Args:
        base: the model, as `load` takes it.
        half: write the adapter in float16.
    """
    out = Path(out)
    corpus = Corpus(sources=list(data), column=column, max_bytes=recipe.max_bytes, encoding=encoding)
    model, tokenizer = load(base)
    backbone = backbone_of(model)
    if recipe.row_tokens > backbone.max_tokens:
        raise ContextOverflowError(
            f"row_tokens={recipe.row_tokens}, but the model was trained for {backbone.max_tokens} tokens. Lower it."
        )
    base_fingerprint = fingerprint(model)
    arguments = training_arguments(recipe, out)
    checkpoint = prepare_output(out, recipe, resume=resume, overwrite=overwrite)
    with arguments.main_process_first(desc="tokenising"):
        tokens = TokenisedCorpus.build(corpus, document_tokenizer(tokenizer), on_progress=on_tokenised)
    rows = DocumentRows(tokens, recipe)
    rows_at_once = recipe.rows_per_batch * arguments.world_size
    if len(rows) < rows_at_once:
        raise CorpusError(
            f"the data makes {len(rows)} rows of {recipe.min_row_tokens} to {recipe.row_tokens} tokens, but "
            f"{rows_at_once} are computed at once. Give more text, or lower rows_per_batch and rows_per_step."
        )
    same_data(out, tokens, resume=resume, is_first=arguments.should_save)
    done = finished_result(out) if resume else None
    if done is not None:
        return AdapterTrainingResult(**done)
    set_seed(recipe.seed)
    adapter = SentinelAdapter(backbone, recipe.adapter, seed=recipe.seed)
    method = Sentinel(num_sentinels=recipe.adapter.num_sentinels, see_earlier=recipe.adapter.see_earlier)
    compressed = CompressedModel(model, method, adapter, backbone=backbone)
    training = AdapterTraining(compressed, recipe.teacher_weight)
    trainer = AdapterTrainer(
        recipe,
        model=training,
        args=arguments,
        train_dataset=rows,
        callbacks=[ProgressCallback(recipe.rows_per_step * recipe.row_tokens)],
    )
    trainer.data_collator = FoldingCollator(recipe, backbone.vocab_size, lambda: trainer.state.epoch or 0.0)
    trainer.remove_callback(transformers.PrinterCallback)
    if on_start is not None:
        device = str(arguments.device)
        on_start(recipe.plan(model, device=device, corpus_tokens=len(tokens.tokens), num_rows=len(rows)))
    started = time.monotonic()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.wait_for_everyone()
    if trainer.removed[3] > 0:
        trainer._take_sums({})
    sums = (trainer.removed_in_all / trainer.removed_in_all[3].clamp(min=1)).tolist()
    result = AdapterTrainingResult(
        steps=trainer.state.global_step,
        rows=trainer.state.global_step * recipe.rows_per_step,
        corpus_tokens=len(tokens.tokens),
        trained_parameters=sum(parameter.numel() for parameter in training.adapter_parameters),
        mean_loss=outcome.training_loss,
        last_loss=next((line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line), None),
        nominal_removed=sums[0],
        achieved_removed=sums[1],
        average_removed=sums[2],
        seconds=time.monotonic() - started,
        hardware=hardware(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    if trainer.args.should_save:
        with written_whole(out) as draft:
            adapter.save(draft, fingerprint=base_fingerprint, half=half)
            (draft / RESULT_FILE).write_text(sealed_json(result.__dict__), encoding="utf-8")
    compressed.close()
    return result

"""The runner: trains and scores rows, one at a time, and skips those that a results file has.

Several runners may work on one list, each with its own threads: a row in work is locked, an interrupted one goes on
from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.study.rows import Row
from thoughtformer.bench.architectures import decode_flops
from thoughtformer.bench.flops import count_flops
from thoughtformer.bench.records import Record, Spread, append_records, command_line, environment, read_records
from thoughtformer.errors import ConfigError, CorpusError, InputError, OutputError
from thoughtformer.evaluate import BitsReport, document_bits
from thoughtformer.evaluate.profile import LossProfile, sentence_places
from thoughtformer.files import new_file, read_json
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.loading import load_gpthf, load_tokenizer
from thoughtformer.text import SentenceTokenizer
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.packing import PackedRows, TokenisedCorpus
from thoughtformer.train.folder import RECIPE_FILE, finished_result
from thoughtformer.train.recipe import Recipe
from thoughtformer.train.run import TrainingResult, recipe_tokenizer, train

__all__ = ["StudySettings", "finished", "run_rows"]

#: Keys of a recipe that change nothing in what is trained.
UNCOMPARED = ("name", "save_every_steps", "log_every_steps")


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What all rows share.

    Attributes:
        data: training text, as `Corpus` takes it.
        valid: held-out text by name.
        out: the file of finished rows.
        work: a folder for checkpoints and models.
        valid_bytes: of each held-out text.
        document_bytes: of each of its documents, from the start, so that many are seen.
        on_progress: told what happens.
    """

    data: Sequence[str]
    valid: Mapping[str, str]
    out: Path
    work: Path
    valid_bytes: int = 500_000
    document_bytes: int = 24_000
    on_progress: Callable[[str], None] = field(default=lambda text: None)

    def __post_init__(self) -> None:
        taken = sorted({"recipe", "data", "data_digest"} & set(self.valid))
        if taken:
            raise InputError(f"a held-out text can't be called {taken[0]!r}, which names something else of a row.")

    def data_names(self) -> list[str]:
        """The training files, without where they lie."""
        return [Path(source).name for source in self.data]

    def data_digest(self, recipe: Recipe) -> str:
        """SHA-256 of the ids that a recipe trains on."""
        return _tokenised(recipe, self).digest

    def valid_summary(self, name: str) -> dict[str, Any]:
        """Which part of a held-out text is scored."""
        documents = self.documents(name)
        return {
            "bytes": sum(len(document.encode()) for document in documents),
            "documents": len(documents),
            "digest": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        }

    def documents(self, name: str) -> list[str]:
        """The held-out documents of that name."""
        documents, num_bytes = [], 0
        for document in Corpus(sources=[self.valid[name]]):
            part = document.encode()[: self.document_bytes].decode(errors="ignore")
            documents.append(part)
            num_bytes += len(part.encode())
            if num_bytes >= self.valid_bytes:
                break
        return documents


def finished(row: Row, settings: StudySettings) -> bool:
    """Whether the results file has the row.

    Raises:
        ConfigError: it has one of that name, but of another recipe, or of other texts.
    """
    for record in read_records([settings.out]) if settings.out.exists() else []:
        if (record.theme, record.case, record.peer, record.workload) != ("study", "train", row.variant, row.workload):
            continue
        before, now = _comparable(Recipe.from_dict(record.settings["recipe"])), _comparable(row.recipe())
        differing = [f"{key}: {before[key]!r}, now {now[key]!r}" for key in now if before[key] != now[key]]
        texts: dict[str, Any] = {"data": settings.data_names()}
        if "data_digest" in record.settings:  # rows of older versions have none
            texts["data_digest"] = settings.data_digest(row.recipe())
        texts |= {name: settings.valid_summary(name) for name in settings.valid}
        for name, text in texts.items():
            known = record.settings.get(name)
            if isinstance(known, dict):
                text = {key: value for key, value in text.items() if key in known or key != "digest"}
                known = {key: known.get(key) for key in text}
            if known != text:
                differing.append(f"{name}: {known!r}, now {text!r}")
        if differing:
            raise ConfigError(
                f"{settings.out} has row {row.name}, but of another run ({'; '.join(differing)}): give another file."
            )
        return True
    return False


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """What a recipe trains, without its name and how often it logs and saves."""
    return {key: value for key, value in recipe.to_dict().items() if key not in UNCOMPARED}


def run_rows(rows: Sequence[Row], settings: StudySettings, *, limit: int | None = None) -> int:
    """Trains and scores those of `rows` that neither are finished nor in work elsewhere; returns how many.

    Stops after `limit` rows.

    Raises:
        CorpusError: less text than a row is named after, or as training and scoring do; finished rows are kept.
        ConfigError, OutputError: as training and scoring do.
    """
    for name in settings.valid:
        settings.documents(name)  # a text that can't be read is told before hours of training
    count = 0
    for row in rows:
        if limit is not None and count >= limit:
            break
        folder = settings.work / row.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"can't write to {folder}: {error.strerror or error}") from None
        try:
            with FileLock(settings.work / f"{row.name}.lock", timeout=0):
                # Looked up under the lock: another runner may just have finished it.
                if finished(row, settings):
                    continue
                settings.on_progress(f"{row.name}: training")
                record = _run(row, settings, folder)
                if finished(row, settings):
                    settings.on_progress(f"{row.name}: {settings.out} got it meanwhile, from a run in another folder")
                    continue
                append_records(settings.out, [record])
                count += 1
        except Timeout:
            settings.on_progress(f"{row.name}: in work elsewhere")
    return count


def _run(row: Row, settings: StudySettings, folder: Path) -> Record:
    recipe = row.recipe()
    where = _environment(settings.work / f"{row.name}.begun.json")  # now: the checkout may move on while the row trains
    if "+changes" in str(where.get("commit")):
        settings.on_progress(f"{row.name}: trained by a checkout with uncommitted changes, and the row will say so")
    _enough_text(recipe, settings)
    result = _train(recipe, settings, folder)
    model, tokenizer = load_gpthf(folder)
    metrics = {
        "parameters": float(result.parameters),
        "layer_parameters": float(sum(p.numel() for p in model.model.stages.parameters())),
        "tokens": float(result.tokens),
        "bytes": float(result.corpus_bytes),
        "training_flops": _training_flops(model, _some_rows(recipe, settings)) * result.tokens,
        "decode_flops": decode_flops(model, model.config.max_position_embeddings // 2),
    }
    details: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "data": settings.data_names(),
        "data_digest": settings.data_digest(recipe),
    }
    reference = load_tokenizer("tiny-gpthf")
    for name in settings.valid:
        settings.on_progress(f"{row.name}: scoring {name}")
        started = time.monotonic()
        report, profile = _score(model, tokenizer, reference, settings.documents(name))
        metrics[f"{name}_bits_per_byte"] = report.bits_per_byte
        metrics[f"{name}_bits_of_sentence_ends_fraction"] = report.bits_of_sentence_ends_fraction
        details[name] = profile.bits_per_token() | settings.valid_summary(name)
        settings.on_progress(f"{row.name}: {name} {report.bits_per_byte:.4f} ({time.monotonic() - started:.0f} s)")
    return Record(
        theme="study",
        case="train",
        peer=row.variant,
        workload=row.workload,
        metrics={name: Spread.of([value]) for name, value in metrics.items()},
        settings=details,
        environment=where,
        command=command_line(),
    )


def _environment(file: Path) -> dict[str, Any]:
    """Where and by what a row is trained; of one that was interrupted, both commits. `file` keeps the first."""
    now = environment()
    what = "which says by what the row was begun"
    first = read_json(file, what, kind=OutputError).get("commit") if file.exists() else None
    if first is not None and first != now.get("commit"):
        return now | {"commit": f"{now.get('commit')}, begun by {first}"}
    if first is None:
        with new_file(file, replace=True) as draft:
            draft.write_text(json.dumps(now) + "\n", encoding="utf-8")
    return now


def _tokenised(recipe: Recipe, settings: StudySettings) -> TokenisedCorpus:
    corpus = Corpus(sources=list(settings.data), max_bytes=recipe.max_bytes)
    return TokenisedCorpus.build(corpus, recipe_tokenizer(recipe))


def _enough_text(recipe: Recipe, settings: StudySettings) -> None:
    """Raises `CorpusError` where a row would be named after more text than there is."""
    size = int(_tokenised(recipe, settings).num_bytes.sum())
    if recipe.max_bytes is not None and size < 0.95 * recipe.max_bytes:
        raise CorpusError(
            f"{recipe.name} needs {recipe.max_bytes:,} bytes of text, in equal shares of the {len(settings.data)} "
            f"sources, and these give {size:,}: give more text."
        )


def _train(recipe: Recipe, settings: StudySettings, folder: Path) -> TrainingResult:
    if get_last_checkpoint(str(folder)) is not None or finished_result(folder) is not None:
        return train(recipe, settings.data, folder, resume=True)
    # Without a checkpoint or a result there is nothing to lose.
    return train(recipe, settings.data, folder, overwrite=(folder / RECIPE_FILE).exists())


def _score(
    model: GPTHFForCausalLM, tokenizer: SentenceTokenizer, reference: SentenceTokenizer, documents: list[str]
) -> tuple[BitsReport, LossProfile]:
    profile, scores = LossProfile(), []
    context = model.config.max_position_embeddings
    for document in documents:
        bits = document_bits(model, tokenizer, document)
        profile.add(bits, sentence_places(reference, document, context_tokens=context))
        scores.append(bits.score())
    return BitsReport.from_scores(scores, context_tokens=context, stride_tokens=context // 2), profile


def _some_rows(recipe: Recipe, settings: StudySettings) -> list[Tensor]:
    """Rows of the training text, from all over it."""
    rows = PackedRows(_tokenised(recipe, settings), recipe.row_tokens)
    return [rows[number]["input_ids"] for number in range(0, len(rows), max(1, len(rows) // 8))]


def _training_flops(model: GPTHFForCausalLM, rows: Sequence[Tensor]) -> float:
    """FLOPs a token of training: three times those of a forward pass (arXiv 2001.08361), all losses included."""
    # The counter follows gradients of modules' inputs, and the sentence losses are handed the head's weight.
    model.train().requires_grad_(False)
    with torch.inference_mode(), count_flops(causal_as_whole=False) as counted:
        for row in rows:
            model(row[None], labels=row[None])  # the chunked loss makes a gradient along the way
    model.eval()
    return 3.0 * counted.total / sum(len(row) for row in rows)

"""What a sentinel adapter is trained on: the recipe, rows of documents, and how each is folded when it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from thoughtformer.compression.adapter import AdapterConfig
from thoughtformer.rules.schedule import lay_out
from thoughtformer.text.packing import TokenisedCorpus
from thoughtformer.train.settings import RunSettings
from thoughtformer.train.spans import FoldingSettings, fold_row

__all__ = ["AdapterRecipe", "DocumentRows", "FoldingCollator"]


@dataclass(frozen=True, kw_only=True)
class AdapterRecipe(RunSettings):
    """A sentinel adapter's training run; beside what `RunSettings` says:

    Args:
        adapter: the adapter's shape.
        folding: how rows are folded.
        row_tokens: real tokens of a row; a document is cut into rows, and a row never spans two.
        min_row_tokens: shorter ends of documents are left out.
        rows_learning_rate: of the sentinels' embeddings.
        weight_decay: of LoRA's matrices.
        teacher_weight: part of the loss that is the divergence from the base model's predictions without compression;
            costs a further forward pass.
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    folding: FoldingSettings = field(default_factory=FoldingSettings)
    min_row_tokens: int = 64
    rows_per_step: int = 8
    rows_per_batch: int = 4
    learning_rate: float = 1e-3
    rows_learning_rate: float = 3e-3
    weight_decay: float = 0.0
    teacher_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            ("rows_learning_rate", self.rows_learning_rate > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("teacher_weight", 0 <= self.teacher_weight <= 1, "from 0 to 1"),
            ("min_row_tokens", 2 <= self.min_row_tokens <= self.row_tokens, "2 or more, and at most row_tokens"),
        )


class DocumentRows(Dataset):
    """Rows of one document each, of at most `row_tokens`."""

    def __init__(self, corpus: TokenisedCorpus, recipe: AdapterRecipe) -> None:
        self.corpus = corpus
        bounds = []
        for start, end in zip(corpus.starts[:-1].tolist(), corpus.starts[1:].tolist(), strict=True):
            for first in range(start, end, recipe.row_tokens):
                last = min(first + recipe.row_tokens, end)
                if last - first >= recipe.min_row_tokens:
                    bounds.append((first, last))
        self.bounds = bounds

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self.bounds[index]
        return {"ids": self.corpus.tokens[start:end].astype(np.int64).tolist(), "index": index}


@dataclass
class FoldingCollator:
    """Makes a batch of rows, each folded anew each time it is drawn.

    The draw depends on the seed, the epoch and the row alone, so that a run can be repeated and resumed.
    """

    recipe: AdapterRecipe
    vocab_size: int
    epoch: Callable[[], float]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        num_summaries = self.recipe.adapter.num_sentinels
        folded = []
        for row in rows:
            generator = np.random.default_rng([self.recipe.seed, int(self.epoch()), row["index"]])
            folded.append(fold_row(row["ids"], self.recipe.folding, num_summaries, generator))
        chunk = lay_out([row.reading for row in folded], vocab_size=self.vocab_size, num_summaries=num_summaries)
        # Each real token is scored once, at the real token before it, sentinels between them or not.
        labels = torch.full_like(chunk.input_ids, -100)
        for row, columns, count in zip(range(len(rows)), chunk.token_column, chunk.num_new.tolist(), strict=True):
            labels[row, columns[: count - 1]] = torch.tensor(rows[row]["ids"][1:])
        entries = chunk.entries
        return {
            "input_ids": chunk.input_ids,
            "entries": torch.stack([entries.position, entries.order, entries.span, entries.since, entries.until]),
            "labels": labels,
            "removed": torch.tensor([[row.nominal, row.achieved, row.average] for row in folded]),
        }

"""Training: recipes, the optimiser, checkpoints, the entry."""

from __future__ import annotations

from thoughtformer.train.recipe import ModelShape, Recipe
from thoughtformer.train.run import TrainingResult, train

__all__ = ["ModelShape", "Recipe", "TrainingResult", "train"]

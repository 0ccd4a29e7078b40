"""A model around a model, as transformers' `generate` needs it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from thoughtformer.models.generating import OwnCacheGenerationMixin

__all__ = ["GeneratingView"]


class GeneratingView(nn.Module, OwnCacheGenerationMixin):
    """Lends transformers' generation a model's configuration, device and embeddings; the forward pass is the view's."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_cache_class = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.generation_config = copy.deepcopy(model.generation_config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def name_or_path(self) -> str:
        return str(self.model.name_or_path)

    def can_generate(self) -> bool:
        """True."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        """The model's own; sentinels are embedded by the adapter."""
        return self.model.get_input_embeddings()  # type: ignore[return-value]

    def get_output_embeddings(self) -> nn.Module:
        """The model's own."""
        return self.model.get_output_embeddings()  # type: ignore[return-value]

"""A model around a model, as transformers' `generate` needs it."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from thoughtformer.errors import UnsupportedError

__all__ = ["GeneratingView"]


class GeneratingView(nn.Module, GenerationMixin):
    """Lends transformers' generation a model's configuration, device and embeddings; the forward pass is the view's."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = True  # what was dropped is gone: transformers then refuses to go back (assisted decoding, lookup)
    _supports_cache_class = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.generation_config = copy.deepcopy(model.generation_config)

    @abstractmethod
    def new_cache(self, num_rows: int) -> Any:
        """An empty cache for so many rows."""

    @abstractmethod
    def check_length(self, num_tokens: int, what: str) -> None:
        """Raises `ContextOverflowError` for a text that is too long; `what` names it."""

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

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r}: a compressed model keeps a cache of "
                "its own."
            )
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, mode, batch_size, max_cache_length
        )
        mask = model_kwargs.get("attention_mask")
        padding = int((mask == 0).sum(-1).min()) if mask is not None else 0
        if generation_config.max_length is not None:
            self.check_length(generation_config.max_length - padding, "prompt and new tokens come to")
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["past_key_values"] = self.new_cache(rows)

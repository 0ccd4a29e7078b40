"""transformers' `generate` for models that keep a cache of their own kind."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from transformers import GenerationMixin

from thoughtformer.errors import UnsupportedError
from thoughtformer.models.transformers_api import CACHE_NAME, name_cache_twice, rename_cache

__all__ = ["OwnCacheGenerationMixin"]


class OwnCacheGenerationMixin(GenerationMixin):
    """Greedy search, sampling and beams by transformers, with a cache from `new_cache`."""

    # What was dropped is gone: transformers then refuses to go back (assisted decoding, prompt lookup).
    _is_stateful = True

    @abstractmethod
    def new_cache(self, num_rows: int) -> Any:
        """An empty cache for so many rows."""

    @abstractmethod
    def check_generated_length(self, num_tokens: int, num_prompt_tokens: int) -> None:
        """Raises `ContextOverflowError` if prompt and new tokens come to more than the model was trained for."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; a cache goes by `cache` or `past_key_values`, in the call and in the output."""
        rename_cache(kwargs)
        return name_cache_twice(super().generate(*args, **kwargs))  # type: ignore[misc]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        # Assisted decoding sets one of its own, and is refused by transformers behind this.
        if generation_config.cache_implementation not in (None, "dynamic_full"):
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r}: {type(self).__name__} keeps a cache "
                "of its own. Leave it out."
            )
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        mask = model_kwargs.get("attention_mask")
        padding = 0 if mask is None else int((mask == 0).sum(-1).min())
        most = generation_config.max_length - padding
        self.check_generated_length(most, 0 if mask is None else mask.shape[-1] - padding)
        if model_kwargs.get(CACHE_NAME) is not None or generation_config.use_cache is False:
            return
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        cache = self.new_cache(rows)
        cache.reserve(most)
        model_kwargs[CACHE_NAME] = cache

"""The bundled pair: equal parameters, documents, bytes and schedule; only the plain GPT reads no sentence ends."""

from __future__ import annotations

from dataclasses import replace

from thoughtformer.compression import AdapterConfig
from thoughtformer.train.compress import AdapterRecipe
from thoughtformer.train.recipe import ModelShape, Recipe
from thoughtformer.train.spans import FoldingSettings

__all__ = ["tiny_gpt", "tiny_gpt_sentinel", "tiny_gpthf"]


def tiny_gpthf() -> Recipe:
    """GPTHF of 6.9M parameters: 1 encoder and 5 body layers, hybrid, the best of five by short runs (docs/log.md)."""
    return Recipe(
        name="tiny-gpthf",
        model=ModelShape(
            hidden_size=256,
            intermediate_size=704,
            num_attention_heads=4,
            num_encoder_layers=1,
            num_body_layers=5,
            body_visibility="hybrid",
        ),
        max_bytes=40_000_000,
        learning_rate=4e-3,
        matrix_learning_rate=4e-3,
        save_every_steps=150,
    )


def tiny_gpt() -> Recipe:
    """A plain GPT of the same parameters, on the same text without sentence ends."""
    gpthf = tiny_gpthf()
    model = replace(gpthf.model, num_encoder_layers=0, num_body_layers=6, body_visibility="causal")
    return replace(gpthf, name="tiny-gpt", model=model, sentence_ends=False)


def tiny_gpt_sentinel() -> AdapterRecipe:
    """The sentinels of the bundled plain GPT: LoRA on every linear layer, one summary a span (docs/log.md)."""
    return AdapterRecipe(
        adapter=AdapterConfig(lora_rank=32, lora_alpha=64.0, lora_dropout=0.0, lora_layers="all"),
        folding=FoldingSettings(min_removed=0.2),
        max_bytes=36_000_000,
        max_steps=680,
        save_every_steps=40,
    )

"""The bundled pair: equal parameters, documents, bytes and schedule; only the plain GPT reads no sentence ends."""

from __future__ import annotations

from dataclasses import replace

from thoughtformer.compression import AdapterConfig
from thoughtformer.train.adapter_rows import AdapterRecipe
from thoughtformer.train.recipe import ModelShape, Recipe
from thoughtformer.train.spans import FoldingSettings

__all__ = ["tiny_gpt", "tiny_gpt_sentinel", "tiny_gpthf"]


def tiny_gpthf() -> Recipe:
    """An hourglass of 7M parameters, 2 + 2 + 2 layers: the best of the study once models learn to copy.

    Its decoder sees the words of eight earlier sentences, and it learns to rebuild sentences (docs/methods/gpthf.md).
    """
    return Recipe(
        name="tiny-gpthf",
        model=ModelShape(
            hidden_size=256,
            intermediate_size=704,
            num_attention_heads=4,
            num_encoder_layers=2,
            num_body_layers=2,
            num_decoder_layers=2,
            body_visibility="fast",
            recent_sentences=8,
            rebuild_loss_weight=0.1,
        ),
        max_bytes=40_000_000,
        learning_rate=4e-3,
        matrix_learning_rate=4e-3,
        save_every_steps=150,
    )


def tiny_gpt() -> Recipe:
    """A plain GPT of the same parameters, on the same text without sentence ends."""
    gpthf = tiny_gpthf()
    model = ModelShape(
        hidden_size=gpthf.model.hidden_size,
        intermediate_size=gpthf.model.intermediate_size,
        num_attention_heads=gpthf.model.num_attention_heads,
        num_encoder_layers=0,
        num_body_layers=6,
        body_visibility="causal",
    )
    return replace(gpthf, name="tiny-gpt", model=model, sentence_ends=False)


def tiny_gpt_sentinel() -> AdapterRecipe:
    """The sentinels of the bundled plain GPT: LoRA on sentinels alone, taught by the base model (docs/log.md)."""
    return AdapterRecipe(
        adapter=AdapterConfig(lora_rank=32, lora_alpha=64.0, lora_dropout=0.0, lora_layers="all", sentinels_only=True),
        folding=FoldingSettings(
            min_span_tokens=6, max_span_tokens=32, max_lag_tokens=48, every_fraction=0.8, policy_fraction=0.1
        ),
        teacher_weight=1.0,
        learning_rate=3e-3,
        rows_learning_rate=1e-2,
        rows_per_step=4,
        max_bytes=36_000_000,
        max_steps=620,
        save_every_steps=40,
    )

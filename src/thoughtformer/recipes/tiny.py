"""The bundled pair: equal parameters, documents, bytes and schedule; only the plain GPT reads no sentence ends."""

from __future__ import annotations

from dataclasses import replace

from thoughtformer.train.recipe import ModelShape, Recipe

__all__ = ["tiny_gpt", "tiny_gpthf"]


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

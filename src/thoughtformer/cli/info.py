"""`thoughtformer info`."""

from __future__ import annotations

import json
import platform
from typing import Annotated

import typer

from thoughtformer.cli.options import AsJson

__all__ = ["info"]


def info(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Describe this model too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, bundled models and, with --model, a model's shape.

    Example: thoughtformer info --model tiny-gpthf
    """
    from importlib.metadata import version

    import torch

    import thoughtformer
    from thoughtformer.models.loading import BUNDLED, BUNDLED_ADAPTERS, load_gpthf, resolve
    from thoughtformer.recipes import RECIPES

    facts: dict[str, object] = {
        "thoughtformer": thoughtformer.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "bundled_models": [name for name in BUNDLED if (resolve(name) / "config.json").exists()],
        "bundled_adapters": list(BUNDLED_ADAPTERS),
        "recipes": list(RECIPES),
    }
    if model is not None:
        loaded, tokenizer = load_gpthf(model)
        config = loaded.config
        facts |= {
            "model": model,
            "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
            "encoder_layers": config.num_encoder_layers,
            "body_layers": config.num_body_layers,
            "decoder_layers": config.num_decoder_layers,
            "body_visibility": config.body_visibility,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "context_tokens": config.max_position_embeddings,
            "reads_sentence_ends": tokenizer.insert_sentence_ends,
        }
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else value
        print(f"{name:{width}}  {shown}")

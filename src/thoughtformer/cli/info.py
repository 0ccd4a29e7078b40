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
    """Show versions, bundled models and, with --model, a model's shape, and whether its context can be compressed.

    Example: thoughtformer info --model tiny-gpthf
    """
    from importlib.metadata import version

    import torch

    import thoughtformer
    from thoughtformer.models.loading import BUNDLED, BUNDLED_ADAPTERS, is_gpthf, resolve
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
        facts |= {"model": model} | (_of_gpthf(model) if is_gpthf(model) else _of_causal_lm(model))
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else value
        print(f"{name:{width}}  {shown}")


def _of_gpthf(model: str) -> dict[str, object]:
    from thoughtformer.models.loading import load_gpthf

    loaded, tokenizer = load_gpthf(model)
    config = loaded.config
    return {
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


def _of_causal_lm(model: str) -> dict[str, object]:
    """Of any other: what it holds of a token, in which layers, and whether it can be compressed exactly."""
    from thoughtformer.compression import compress
    from thoughtformer.errors import UnsupportedError
    from thoughtformer.models.loading import load

    loaded, _ = load(model)
    facts: dict[str, object] = {
        "architecture": type(loaded).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "vocab_size": loaded.config.vocab_size,
    }
    try:
        with compress(loaded, "full") as compressed:
            backbone = compressed.backbone
            near = [group for group in backbone.groups if group.window is not None]
            return facts | {
                "layers": backbone.num_layers,
                "layers_with_a_window": [f"{len(group.layers)} of {group.window}" for group in near],
                "heads": backbone.num_heads,
                "kv_heads": backbone.num_kv_heads,
                "head_dim": backbone.head_dim,
                "context_tokens": backbone.max_tokens,
                "can_be_compressed": True,
            }
    except UnsupportedError as error:
        return facts | {"can_be_compressed": False, "because": str(error)}

"""One call from a name or folder to a model and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from thoughtformer.errors import CheckpointError, TokenizerError, nearest
from thoughtformer.models.causal_lm import GPTHFForCausalLM
from thoughtformer.models.configuration_gpthf import GPTHFConfig
from thoughtformer.text.tokenizer import SentenceTokenizer

__all__ = ["BUNDLED", "BUNDLED_ADAPTERS", "load", "load_causal_lm", "load_tokenizer", "resolve"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = ("tiny-gpthf", "tiny-gpt")
BUNDLED_ADAPTERS = ("tiny-gpt-sentinel",)
PICKLES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth", "model.ckpt", "checkpoint.pt")


def resolve(name_or_path: str | Path, bundled: Sequence[str] = BUNDLED) -> Path:
    """The folder behind a bundled name or a path.

    Raises:
        CheckpointError: neither; names the closest of `bundled`.
    """
    if str(name_or_path) in bundled:
        return ASSETS / str(name_or_path)
    if str(name_or_path) in BUNDLED_ADAPTERS:
        raise CheckpointError(f"{str(name_or_path)!r} is an adapter, not a model: give it as the adapter of tiny-gpt.")
    if str(name_or_path) in BUNDLED:
        raise CheckpointError(f"{str(name_or_path)!r} is a model, not an adapter.{nearest('', bundled)}")
    path = Path(name_or_path)
    if path.is_dir():
        return path
    what = "is a file, not a folder" if path.is_file() else "is neither bundled nor a folder"
    raise CheckpointError(f"{str(name_or_path)!r} {what}.{nearest(str(name_or_path), bundled)}")


def load(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[GPTHFForCausalLM, SentenceTokenizer]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: `tiny-gpthf`, `tiny-gpt`, or a folder that `save_pretrained` or `thoughtformer train` wrote.
        dtype: default: float32 on the CPU, whatever the file holds; the file's own elsewhere.
        device: default: the CPU.

    Raises:
        CheckpointError: no such model; weights that are truncated, of another architecture, or pickled.
        TokenizerError: no tokenizer, or one that doesn't fit the model.
    """
    folder = resolve(name_or_path)
    config = _config(folder)
    _check_weights(folder, config)
    device = torch.device(device or "cpu")
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    model = GPTHFForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
    )
    tokenizer = load_tokenizer(folder)
    _check_fit(config, tokenizer, folder)
    model.to(device)  # type: ignore[arg-type]  transformers wraps Module.to without its types
    return model.eval(), tokenizer


def load_causal_lm(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, Any]:
    """Any causal LM that compression may be asked for, in evaluation mode, and its tokenizer.

    Args:
        name_or_path: what `load` takes, or a folder with another causal LM of transformers in safetensors.
        dtype, device: as for `load`.

    Raises:
        CheckpointError, TokenizerError: as `load`.
    """
    folder = resolve(name_or_path)
    values = _config_values(folder)
    if values.get("model_type") == GPTHFConfig.model_type:
        return load(folder, dtype=dtype, device=device)
    _refuse_pickles(folder)
    device = torch.device(device or "cpu")
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder} holds no causal LM that transformers can load: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what they like for a missing or malformed file
        raise TokenizerError(f"can't read a tokenizer in {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"the tokenizer in {folder} has no tokenizer.json: convert it to a fast one.")
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def load_tokenizer(name_or_path: str | Path, **settings: Any) -> SentenceTokenizer:
    """The tokenizer of a bundled model or folder; `settings` replace its own (`insert_sentence_ends`, ...)."""
    folder = resolve(name_or_path)
    if not (folder / "tokenizer.json").exists():
        raise TokenizerError(f"{folder} has no tokenizer.json. Train one with `thoughtformer tokenizer train`.")
    try:
        return SentenceTokenizer.from_pretrained(str(folder), local_files_only=True, **settings)
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise TokenizerError(f"can't read the tokenizer in {folder}: {error}") from error


def _config_values(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: not a model's folder.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"can't read {folder / 'config.json'}: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds a {type(values).__name__}, not a configuration.")
    return values


def _config(folder: Path) -> GPTHFConfig:
    values = _config_values(folder)
    if values.get("model_type") != GPTHFConfig.model_type:
        raise CheckpointError(
            f"{folder} holds a {values.get('model_type', 'model of unknown type')!r}, not a {GPTHFConfig.model_type!r}."
            " Causal LMs of transformers can be compressed and served; for other uses load them with transformers."
        )
    try:
        return GPTHFConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} doesn't describe a model: {error}") from error


def _refuse_pickles(folder: Path) -> list[Path]:
    """The folder's weight files, all safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            raise CheckpointError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when loaded and so never is. "
                "Convert it to safetensors."
            )
        raise CheckpointError(f"{folder} has no .safetensors weights.")
    return files


def _check_weights(folder: Path, config: GPTHFConfig) -> None:
    """Reads every header, and compares names and shapes with what the configuration needs."""
    files = _refuse_pickles(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118  safe_open is no mapping
                    found[name] = tuple(weights.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or no safetensors file: {error}") from None
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in GPTHFForCausalLM(config).named_parameters()}
    missing = sorted(expected.keys() - found.keys())
    foreign = sorted(found.keys() - expected.keys() - {"lm_head.weight"})
    misshapen = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if missing or foreign or misshapen:
        parts = [
            f"{label} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for label, names in (("lacks", missing), ("has a foreign", foreign), ("has another shape of", misshapen))
            if names
        ]
        raise CheckpointError(f"the weights in {folder} don't fit its config.json: the file {'; '.join(parts)}.")


def _check_fit(config: GPTHFConfig, tokenizer: SentenceTokenizer, folder: Path) -> None:
    if len(tokenizer) > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model only {config.vocab_size}: they don't "
            "belong together."
        )
    end = config.sentence_end_token_id
    if end is not None and tokenizer.sentence_end_token_id != end:
        raise TokenizerError(
            f"the model closes sentences with id {end}, the tokenizer in {folder} with "
            f"{tokenizer.sentence_end_token_id}: they don't belong together."
        )

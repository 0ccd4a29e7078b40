"""One call from a name or folder to a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from thoughtformer.errors import ArgumentError, CheckpointError, TokenizerError, UnsupportedError, nearest
from thoughtformer.files import read_json
from thoughtformer.models.gpthf.causal_lm import GPTHFForCausalLM
from thoughtformer.models.gpthf.configuration import GPTHFConfig
from thoughtformer.names import ASSETS, BUNDLED, BUNDLED_ADAPTERS, resolve
from thoughtformer.text.tokenizer import TOKENIZER_SETTINGS, SentenceTokenizer

__all__ = ["ASSETS", "BUNDLED", "BUNDLED_ADAPTERS", "is_gpthf", "load", "load_gpthf", "load_tokenizer", "resolve"]

#: What transformers raises for folders that it can't load.
UNLOADABLE = (OSError, TypeError, LookupError, AttributeError, ValueError, SafetensorError, RuntimeError)
TOKENIZER_FILE = "tokenizer_config.json"
PICKLES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth", "model.ckpt", "checkpoint.pt")


def load_gpthf(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[GPTHFForCausalLM, SentenceTokenizer]:
    """A GPTHF, or its plain GPT, in evaluation mode, and its tokenizer.

    Args:
        name_or_path: a bundled name, or a folder that `save_pretrained` or `thoughtformer train` wrote.
        dtype, device: as for `load`.

    Raises:
        CheckpointError, TokenizerError: as `load`.
    """
    folder = resolve(name_or_path)
    config = _config(folder)
    _check_weights(folder, config)
    device = torch.device(device or "cpu")
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    try:
        model = GPTHFForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
        )
    except UNLOADABLE as error:
        raise CheckpointError(f"transformers can't load {folder}: {error}") from error
    tokenizer = load_tokenizer(folder)
    _check_fit(config, tokenizer, folder)
    tokenizer.model_max_length = config.max_position_embeddings
    model.to(device)  # type: ignore[arg-type]  transformers wraps Module.to without its types
    return model.eval(), tokenizer


def is_gpthf(name_or_path: str | Path) -> bool:
    """Whether it is a model of this package, and not another causal LM; raises `CheckpointError`."""
    folder = resolve(name_or_path)
    return folder.suffix != ".gguf" and _config_values(folder).get("model_type") == GPTHFConfig.model_type


def load(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """A causal LM in evaluation mode, and its tokenizer: of this package, or any of transformers in safetensors.

    Args:
        name_or_path: `tiny-gpthf`, `tiny-gpt`, a folder with a causal LM, a GGUF file of an architecture that
            transformers reads from such, or a hub's name of one that was downloaded.
        dtype: default: what config.json says, float32 for the bundled ones; on the CPU float32.
        device: default: the CPU.

    Raises:
        CheckpointError: no such model; weights that are truncated, of another architecture, or pickled.
        TokenizerError: no tokenizer, or one that doesn't fit the model.
        UnsupportedError: a GGUF file without the package that reads it.
    """
    folder, file = resolve(name_or_path), {}
    if folder.suffix == ".gguf":
        if find_spec("gguf") is None:
            raise UnsupportedError('reading GGUF needs the package gguf: pip install "thoughtformer[bench]".')
        folder, file = folder.parent, {"gguf_file": folder.name}
    else:
        if is_gpthf(folder):
            return load_gpthf(folder, dtype=dtype, device=device)
        _refuse_pickles(folder)
    # What reads GGUF raises whatever it comes across in a damaged file.
    unloadable = (Exception,) if file else UNLOADABLE
    device = torch.device(device or "cpu")
    if dtype is None and (device.type == "cpu" or file):
        dtype = torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **file,
        )
        model, found = loaded
        if file:
            # Its weights are plain ones now; with these, transformers would refuse to save it.
            model.config.__dict__.pop("quantization_config", None)
            model.hf_quantizer, model.is_quantized = None, False
    except unloadable as error:
        raise CheckpointError(f"{folder} holds no causal LM that transformers can load: {error}") from error
    # transformers draws weights at random that a folder lacks, and says so in its log alone.
    _refuse_unfit(folder, {"lacks": found["missing_keys"], "has another shape of": found["mismatched_keys"]})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **file)
    except Exception as error:  # transformers and tokenizers raise what they like for a missing or malformed file
        raise TokenizerError(f"can't read a tokenizer in {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"the tokenizer in {folder} has no tokenizer.json: convert it to a fast one.")
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def load_tokenizer(name_or_path: str | Path, **settings: Any) -> SentenceTokenizer:
    """The tokenizer of a bundled model or folder.

    Args:
        name_or_path: as for `load`.
        settings: that replace its own, by their names: see `SentenceTokenizer`.

    Raises:
        ArgumentError: a setting that isn't one.
        TokenizerError: no tokenizer, or a damaged one.
    """
    for name in settings:
        if name not in TOKENIZER_SETTINGS:
            raise ArgumentError(f"load_tokenizer takes no argument {name!r}.{nearest(name, TOKENIZER_SETTINGS)}")
    folder = resolve(name_or_path)
    if not (folder / "tokenizer.json").exists():
        raise TokenizerError(f"{folder} has no tokenizer.json. Train one with `thoughtformer tokenizer train`.")
    try:
        if (folder / TOKENIZER_FILE).exists():
            read_json(folder / TOKENIZER_FILE, "how the tokenizer is set", kind=TokenizerError)
        return SentenceTokenizer.from_pretrained(str(folder), local_files_only=True, **settings)
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise TokenizerError(f"can't read the tokenizer in {folder}: {error}") from error


def _config_values(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json: not a model's folder.")
    # transformers takes a generation configuration that it can't read for one that isn't there.
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json", "how the model generates")
    return read_json(folder / "config.json", "the model's configuration")


def _config(folder: Path) -> GPTHFConfig:
    values = _config_values(folder)
    if values.get("model_type") != GPTHFConfig.model_type:
        raise CheckpointError(
            f"{folder} holds a {values.get('model_type', 'model of unknown type')!r}, not a {GPTHFConfig.model_type!r}."
            " Causal LMs of transformers can be compressed, written with and served: thoughtformer.load takes them."
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
    _refuse_unfit(folder, {"lacks": missing, "has a foreign": foreign, "has another shape of": misshapen})


def _refuse_unfit(folder: Path, wrong: Mapping[str, Iterable[Any]]) -> None:
    """Raises `CheckpointError` if names of weights are wrong, by what is wrong with them."""
    parts = []
    for label, names in wrong.items():
        named = sorted(str(name[0] if isinstance(name, tuple) else name) for name in names)
        if named:
            parts.append(f"{label} {named[0]}" + (f" and {len(named) - 1} more" if len(named) > 1 else ""))
    if parts:
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

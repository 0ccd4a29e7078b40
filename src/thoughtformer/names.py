"""Names that users write, known before anything heavy is imported, so that a wrong one is told at once.

What they stand for is elsewhere; tests/contract compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from pkgutil import iter_modules

from thoughtformer.errors import CheckpointError, nearest

__all__ = [
    "ASSETS",
    "BENCH_CASES",
    "BUNDLED",
    "BUNDLED_ADAPTERS",
    "DRAFTER_NAMES",
    "METHOD_NAMES",
    "RECIPE_NAMES",
    "nearest_method",
    "resolve",
]

#: How a hub names a repository.
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ASSETS = Path(__file__).resolve().parent / "assets"
BUNDLED = ("tiny-gpthf", "tiny-gpt")
BUNDLED_ADAPTERS = ("tiny-gpt-sentinel",)
RECIPE_NAMES = ("tiny-gpthf", "tiny-gpt")
#: The methods are their files.
METHOD_NAMES = tuple(
    module.name for module in iter_modules([str(Path(__file__).resolve().parent / "compression" / "methods")])
)
#: What proposes tokens.
DRAFTER_NAMES = ("suffix", "model")
BENCH_CASES = {
    "speed": (
        "prefill",
        "decode",
        "batch1",
        "batch8",
        "packed",
        "compressed",
        "architectures",
        "requests",
        "known",
        "drafts",
        "draft_model",
    ),
    "memory": ("kv_bytes", "resident"),
    "quality": ("bits", "compression", "recall", "at_bytes"),
}

#: kvpress's methods, by its names without "Press": what comes nearest to each here, and in what it is like.
_KVPRESS = {
    "adakv": ("h2o", "heads hold entries of their own"),
    "criticalkv": ("h2o", "what is attended to most is held"),
    "duoattention": ("streaming", "first and recent entries are held"),
    "expectedattention": ("expected_attention", "it is the same, at intervals"),
    "finch": ("h2o", "what is attended to most is held"),
    "keydiff": ("h2o", "heads hold entries of their own"),
    "knorm": ("h2o", "heads hold entries of their own"),
    "kvzip": ("kvzip", "it is the same, chunk by chunk"),
    "lagkv": ("h2o", "older entries make room by a score"),
    "observedattention": ("h2o", "what was attended to most is held"),
    "pyramidkv": ("snapkv", "its pyramid gives early layers more"),
    "qfilter": ("h2o", "heads hold entries of their own"),
    "quest": ("selection", "pages are chosen by bounds of their keys"),
    "random": ("random", "any may go"),
    "simlayerkv": ("streaming", "first and recent entries are held"),
    "snapkv": ("snapkv", "it is the same, at intervals"),
    "streamingllm": ("streaming", "first and recent entries are held"),
    "think": ("h2o", "what is attended to most is held"),
    "tova": ("tova", "it is the same"),
}


def resolve(name_or_path: str | Path, bundled: Sequence[str] = BUNDLED) -> Path:
    """The folder, or GGUF file, behind a bundled name, a path, or a hub's name of what was downloaded before.

    Raises:
        CheckpointError: none of these; names the closest of `bundled`.
    """
    if str(name_or_path) in bundled:
        return ASSETS / str(name_or_path)
    if str(name_or_path) in BUNDLED_ADAPTERS:
        raise CheckpointError(f"{str(name_or_path)!r} is an adapter, not a model: give it as the adapter of tiny-gpt.")
    if str(name_or_path) in BUNDLED:
        raise CheckpointError(f"{str(name_or_path)!r} is a model, not an adapter.{nearest('', bundled)}")
    path = Path(name_or_path)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if HUB_NAME.fullmatch(str(name_or_path)) and not path.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(name_or_path), local_files_only=True))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            raise CheckpointError(
                f"{str(name_or_path)!r} is no folder, nor in the Hugging Face cache of this machine: download it "
                f"(hf download {name_or_path})."
            ) from None
    what = "is a file, not a folder" if path.is_file() else "is neither bundled nor a folder"
    raise CheckpointError(f"{str(name_or_path)!r} {what}.{nearest(str(name_or_path), bundled)}")


def nearest_method(name: str) -> str:
    """A hint for a compression method that isn't known, also for those of kvpress."""
    plain = "".join(character for character in name.lower() if character.isalnum()).removesuffix("press")
    if plain in _KVPRESS:
        here, why = _KVPRESS[plain]
        return (
            f" Of those here {here!r} is nearest to kvpress's {name}: {why}. Known: {', '.join(sorted(METHOD_NAMES))}."
        )
    return nearest(name, METHOD_NAMES)

"""What the cases share: options, regular texts, llama.cpp on the same weights, one record a peer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from thoughtformer.bench.flops import regular_ids
from thoughtformer.bench.peers import PEERS, PeerProcess, find_peer
from thoughtformer.bench.records import Record
from thoughtformer.bench.shapes import SENTENCE_TOKENS, Size
from thoughtformer.bench.timing import Run, interleaved
from thoughtformer.convert.gguf import write_gguf
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.packed_linear import using_packed_weights

__all__ = ["Options", "measured", "next_ids", "regular_text", "split_name", "start_llama_cpp", "without_llama_cpp"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Attributes:
        repeats: timed rounds; fewer for contexts past 8,192 tokens, whose runs take minutes.
        contexts: instead of the size's own.
        on_progress: told what runs.
    """

    size: Size
    repeats: int = 5
    contexts: tuple[int, ...] | None = None
    on_progress: Callable[[str], None] = field(default=lambda text: None)

    def rounds(self, context: int) -> tuple[int, int]:
        """Timed rounds and warm-ups for a context."""
        return (self.repeats, 1) if context <= 8192 else (max(1, self.repeats // 2), 0)


def regular_text(model: GPTHFForCausalLM, count: int) -> list[int]:
    """Ids of a text of equal sentences."""
    end = model.config.sentence_end_token_id
    return regular_ids(count, sentence_tokens=SENTENCE_TOKENS, sentence_end_token_id=end)


def next_ids(model: GPTHFForCausalLM, batch: int, position: int) -> torch.Tensor:
    """The token that the regular text has at a position, for every row."""
    end = model.config.sentence_end_token_id
    is_end = end is not None and position % SENTENCE_TOKENS == SENTENCE_TOKENS - 1
    return torch.full((batch,), end if is_end and end is not None else regular_text(model, 1)[0])


def split_name(split: tuple[int, int]) -> str:
    return f"gpthf {split[0]}+{split[1]}"


def measured(
    case: str, workload: dict[str, Any], runs: dict[str, Run], settings: dict[str, dict[str, Any]], **how: Any
) -> list[Record]:
    """One record a peer."""
    with using_packed_weights():
        figures = interleaved(runs, **how)
    return [
        Record(
            theme="speed",
            case=case,
            peer=name,
            workload=workload,
            metrics=metrics,
            settings=settings.get(name, {}),
        )
        for name, metrics in figures.items()
    ]


def start_llama_cpp(stack: ExitStack, model: GPTHFForCausalLM, options: Options, context: int) -> PeerProcess | None:
    """llama.cpp on the same weights, if it is installed."""
    python = find_peer("llama-cpp")
    if python is None:
        return None
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    path = Path(folder) / "model.gguf"
    write_gguf(model, options.size.tokenizer(), path)
    process = stack.enter_context(PeerProcess(python, PEERS["llama-cpp"].worker, threads=torch.get_num_threads()))
    process.about = process.ask(ask="load", path=str(path), threads=torch.get_num_threads(), context=context)
    return process


def without_llama_cpp(case: str, workload: dict[str, Any]) -> Record:
    why = "not installed here: thoughtformer bench peers --install llama-cpp"
    return Record(theme="speed", case=case, peer="llama.cpp", workload=workload, skipped=why)

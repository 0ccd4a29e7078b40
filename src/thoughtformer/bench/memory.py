"""Memory: bytes of keys and values held, checked against the formula, and the most that the process took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from thoughtformer.bench.flops import regular_ids
from thoughtformer.bench.records import Record, Spread
from thoughtformer.bench.running import Options
from thoughtformer.bench.shapes import SENTENCE_TOKENS, SIZES, Size
from thoughtformer.bench.synthetic import filled_cache
from thoughtformer.convert.llama import as_llama
from thoughtformer.errors import InputError, ThoughtformerError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.packed_linear import pack_weights, using_packed_weights
from thoughtformer.models.transformers_api import CACHE_NAME

__all__ = ["CASES"]


def kv_bytes(options: Options) -> Iterator[Record]:
    """Bytes of one row's cache, over the 25 tokens of a sentence: GPTHF holds most just before it ends.

    Two shapes: the size's own splits, and the paper's two thirds of encoder.
    """
    for size, splits in ((options.size, options.size.splits), _paper_shape(options.size)):
        models = {f"gpthf {a}+{b}": size.gpthf((a, b)) for a, b in splits} | {"gpt": size.gpt()}
        for context in options.contexts or size.contexts:
            if context < 2 * SENTENCE_TOKENS:
                raise InputError(f"--contexts {context}: give {2 * SENTENCE_TOKENS} tokens or more, two sentences.")
            options.on_progress(f"cache bytes at {context:,} tokens")
            workload = {"context": context, "layers": size.layers, "size": size.name}
            for name, model in models.items():
                # A plain GPT's cache, gigabytes of it, grows evenly: one length tells.
                lengths = [context] if name == "gpt" else range(context, context - SENTENCE_TOKENS, -1)
                sizes = [float(_checked_bytes(model, length)) for length in lengths]
                metrics = {"bytes": Spread.of(sizes)}
                yield Record(theme="memory", case="kv_bytes", peer=name, workload=workload, metrics=metrics)


def _checked_bytes(model: GPTHFForCausalLM, context: int) -> int:
    """Bytes that a row of so many tokens holds; raises `ThoughtformerError` if the formula says otherwise."""
    cache = filled_cache(model, num_rows=1, context=context)
    longest = {stage.name: stage.longest for stage in cache.stages}
    expected, found = model.model.cache_bytes(longest, 1, reserve_tokens=context), cache.num_bytes()
    if found != expected:
        raise ThoughtformerError(f"a cache of {context} tokens holds {found} bytes, the formula says {expected}.")
    return found


def _paper_shape(size: Size) -> tuple[Size, tuple[tuple[int, int], ...]]:
    """The paper's 16 + 8 layers, or as small in proportion."""
    if size.name != "full":
        return replace(size, layers=6, contexts=size.contexts[-1:]), ((4, 2),)
    paper = replace(size, layers=24, hidden_size=1024, intermediate_size=4096, heads=16, contexts=(4096, 32768))
    return paper, ((16, 8),)


def resident(options: Options) -> Iterator[Record]:
    """The most memory that a prompt and eight tokens take beyond the model as loaded, in a process for each peer.

    What a peer adds to the model to be fast, as our packed copies of the weights, counts.
    """
    size = options.size
    context = (options.contexts or (size.engine_context * 4,))[0]
    workload = {"context": context, "new_tokens": 8, "size": size.name}
    for peer in (*(f"gpthf {a}+{b}" for a, b in size.splits), "gpt", "transformers Llama"):
        options.on_progress(f"resident memory: {peer}")
        peaks = []
        for _ in range(min(options.repeats, 3)):
            question = json.dumps({"size": size.name, "peer": peer, "context": context})
            done = subprocess.run(
                [sys.executable, "-m", __name__, question],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            )
            if done.returncode != 0:
                raise ThoughtformerError(f"measuring {peer} failed: {done.stderr.strip()[-500:]}")
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
        if peaks[0] is None:
            why = "this system doesn't tell a process's peak memory"
            yield Record(theme="memory", case="resident", peer=peer, workload=workload, skipped=why)
            continue
        yield Record(
            theme="memory",
            case="resident",
            peer=peer,
            workload=workload,
            metrics={"peak_bytes": Spread.of([float(peak) for peak in peaks])},
        )


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")


@torch.inference_mode()
def _peak_of(size: Size, peer: str, context: int) -> int | None:
    """Peak resident bytes above those of the loaded model; None where the system can't tell."""
    gpt = size.gpt() if peer in ("gpt", "transformers Llama") else None
    ids = torch.tensor([regular_ids(context, sentence_tokens=SENTENCE_TOKENS, sentence_end_token_id=1)])
    if gpt is None:
        encoder, body = (int(part) for part in peer.removeprefix("gpthf ").split("+"))
        model: Any = size.gpthf((encoder, body))
    else:
        model = gpt if peer == "gpt" else as_llama(gpt)

    def work(ids: torch.Tensor) -> None:
        if peer != "transformers Llama":
            pack_weights(model)
        cache = DynamicCache() if peer == "transformers Llama" else model.new_cache(1)
        model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        for _ in range(8):
            model(torch.tensor([[5]]), use_cache=True, **{CACHE_NAME: cache})

    try:
        before = _status_bytes("VmRSS")
        with using_packed_weights():
            work(ids[:, :8])
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far, that of packing
            work(ids)
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


#: What `bench memory` measures, by name.
CASES: dict[str, Callable[[Options], Iterator[Record]]] = {"kv_bytes": kv_bytes, "resident": resident}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(_peak_of(SIZES[asked["size"]], asked["peer"], asked["context"])) + "\n")

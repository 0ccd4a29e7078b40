"""Whole requests through the engine, transformers.generate and llama.cpp: first token and tokens a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from thoughtformer.bench.records import Record
from thoughtformer.bench.running import (
    Options,
    measured,
    regular_text,
    split_name,
    start_llama_cpp,
    without_llama_cpp,
)
from thoughtformer.bench.timing import Run, memory_read_rate
from thoughtformer.convert.llama import as_llama
from thoughtformer.engine import Engine
from thoughtformer.sampling import SamplingParams

__all__ = ["batch1", "batch8"]


def batch1(options: Options) -> Iterator[Record]:
    """One row, short context: every token reads all weights once, so memory sets the limit."""
    yield from _requests(options, "batch1", batch=1, context=32, new_tokens=64)


def batch8(options: Options) -> Iterator[Record]:
    """Eight rows through the engine and through transformers.generate."""
    yield from _requests(options, "batch8", batch=8, context=options.size.engine_context, new_tokens=32)


def _requests(options: Options, case: str, *, batch: int, context: int, new_tokens: int) -> Iterator[Record]:
    size = options.size
    gpt, gpthf = size.gpt(), size.gpthf(size.splits[0])
    llama, tokenizer = as_llama(gpt), size.tokenizer()
    prompts = [regular_text(gpt, context) for _ in range(batch)]
    weight_bytes = sum(parameter.nbytes for parameter in gpt.parameters())
    workload = {"batch": batch, "context": context, "new_tokens": new_tokens, "size": size.name}
    workload |= {"weight_bytes": weight_bytes}
    params = SamplingParams(max_new_tokens=new_tokens, ignore_end_of_text=True)
    name = split_name(size.splits[0])
    runs: dict[str, Run] = {"memory": lambda: {"bytes_per_second": memory_read_rate()}} if batch == 1 else {}
    for peer, model in (("gpt", gpt), (name, gpthf)):
        engine = Engine(model, tokenizer, max_rows=batch)
        runs[peer] = lambda engine=engine: _engine_request(engine, prompts, params)
        if batch == 1:
            compiled = Engine(model, tokenizer, max_rows=batch, compile=True)
            failure = _failure(compiled, prompts)
            if failure is not None:
                yield Record(theme="speed", case=case, peer=f"{peer}, compiled", workload=workload, skipped=failure)
                continue
            runs[f"{peer}, compiled"] = lambda engine=compiled: _engine_request(engine, prompts, params)
    for cache in ("dynamic", "static"):
        runs[f"transformers Llama, {cache} cache"] = lambda cache=cache: _generate(llama, prompts, new_tokens, cache)
    settings = {peer: {"program": "Engine"} for peer in runs if peer.startswith("gpt")}
    with ExitStack() as stack:
        llama_cpp = start_llama_cpp(stack, gpt, options, context + new_tokens + 8) if batch == 1 else None
        if llama_cpp is not None:
            peer_process = llama_cpp
            settings["llama.cpp"] = llama_cpp.about

            def ask() -> dict[str, float]:
                answer = peer_process.ask(ask="generate", ids=prompts[0], new_tokens=new_tokens)
                seconds = answer["decode_seconds"]
                return {
                    "first_token_seconds": answer["first_token_seconds"],
                    "tokens_per_second": (new_tokens - 1) / seconds,
                    "seconds": answer["first_token_seconds"] + seconds,
                }

            runs["llama.cpp"] = ask
        elif batch == 1:
            yield without_llama_cpp(case, workload)
        yield from measured(
            case,
            workload,
            runs,
            settings,
            repeats=options.repeats,
            on_run=lambda name, number: options.on_progress(f"{batch} requests at once: {name}, round {number}"),
        )


def _failure(compiled: Engine, prompts: list[list[int]]) -> str | None:
    """Why this machine can't compile steps, if it can't: there may be no C++ compiler."""
    try:
        compiled.generate(prompts, SamplingParams(max_new_tokens=4, ignore_end_of_text=True))
    except TorchDynamoException as error:
        return f"torch.compile failed: {' '.join(str(error).split())[:200]}"
    return None


def _engine_request(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> dict[str, float]:
    done = engine.generate(prompts, params)
    first = max(completion.first_token_seconds for completion in done)
    seconds = max(completion.seconds for completion in done)
    new = sum(completion.usage.new_tokens for completion in done)
    return {
        "first_token_seconds": first,
        "tokens_per_second": (new - len(done)) / (seconds - first),
        "seconds": seconds,
    }


class _Clock(StoppingCriteria):
    """Notes when transformers' generate has chosen each token; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.inference_mode()
def _generate(llama: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int, cache: str) -> dict[str, float]:
    ids, clock = torch.tensor(prompts), _Clock()
    started = time.perf_counter()
    output = llama.generate(  # type: ignore[attr-defined]  transformers hides its mixin from type checkers
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation=cache,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    seconds = time.perf_counter() - started
    assert isinstance(output, torch.Tensor)
    assert output.shape[1] == ids.shape[1] + new_tokens
    first, last = clock.times[0] - started, clock.times[-1] - started
    return {
        "first_token_seconds": first,
        "tokens_per_second": len(prompts) * (new_tokens - 1) / (last - first),
        "seconds": seconds,
    }

"""What serving gains: prompts whose sentences are known, and requests of mixed length that share the machine."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator

import torch
from transformers import LlamaForCausalLM

from thoughtformer.bench.records import Record
from thoughtformer.bench.running import Options, measured, split_name
from thoughtformer.bench.shapes import SENTENCE_TOKENS
from thoughtformer.bench.timing import Run, seconds_of
from thoughtformer.convert.llama import as_llama
from thoughtformer.engine import Engine, SentenceStore
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.packed_linear import pack_weights
from thoughtformer.sampling import SamplingParams
from thoughtformer.stores.model_sentences import StoredSentences

__all__ = ["known", "requests"]

REQUESTS = 16


def known(options: Options) -> Iterator[Record]:
    """Time to read a prompt of which every sentence is in the store, beside reading it, and beside the plain GPT."""
    size = options.size
    contexts = options.contexts or (size.contexts[-1],)
    hourglass = _hourglass(size.layers)
    models = {split_name(size.splits[0]): size.gpthf(size.splits[0])}
    models |= {"hourglass " + "+".join(map(str, hourglass)): size.gpthf(hourglass, "fast")}
    gpt = size.gpt()
    for model in (*models.values(), gpt):
        pack_weights(model)
    for context in contexts:
        with tempfile.TemporaryDirectory() as folder, SentenceStore(folder) as store:
            runs: dict[str, Run] = {}
            for name, model in models.items():
                ids, source = _random_text(model, context), store.of(model)
                model.model.remember_sentences(torch.tensor(ids), source)
                runs[f"{name}, known"] = _prefill(model, ids, source)
                runs[name] = _prefill(model, ids, None)
            stats = store.stats()
            settings = {f"{name}, known": {"store_bytes": stats.used_bytes} for name in models}
            runs["gpt"] = _prefill(gpt, _random_text(gpt, context), None)
            repeats, warmups = options.rounds(context)
            yield from measured(
                "known",
                {"batch": 1, "context": context, "size": size.name},
                runs,
                settings,
                repeats=repeats,
                warmups=warmups,
                on_run=lambda name, number, context=context: options.on_progress(
                    f"prefill of {context:,} tokens, known: {name}, round {number}"
                ),
            )


def _random_text(model: GPTHFForCausalLM, count: int) -> list[int]:
    """Ids of a text of equally long sentences, no two alike."""
    end = model.config.sentence_end_token_id
    ids = torch.randint(3, model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    if end is not None and model.config.num_encoder_layers:
        ids[SENTENCE_TOKENS - 1 :: SENTENCE_TOKENS] = end
    return ids.tolist()


def _prefill(model: GPTHFForCausalLM, ids: list[int], source: StoredSentences | None) -> Run:
    tokens, row = torch.tensor(ids), torch.zeros(len(ids), dtype=torch.long)
    wanted = torch.arange(len(ids)) == len(ids) - 1

    @torch.inference_mode()
    def work() -> None:
        model.ragged_logits(tokens, row, model.new_cache(1), wanted=wanted, sentence_source=source)

    return lambda: {"seconds": seconds_of(work)}


def requests(options: Options) -> Iterator[Record]:
    """Requests of mixed length, all at hand: continuous batching, one at a time, and transformers' generate."""
    size = options.size
    chooser = random.Random(0)
    longest, most = size.longest_prompt, 128 if size.name == "full" else 8
    lengths = [(chooser.randint(longest // 16, longest), chooser.randint(most // 8, most)) for _ in range(REQUESTS)]
    gpt, hourglass, hybrid = size.gpt(), size.gpthf(_hourglass(size.layers), "fast"), size.gpthf(size.splits[0])
    tokenizer = size.tokenizer()
    runs: dict[str, Run] = {}
    for name, model in (("gpt", gpt), ("hybrid", hybrid), ("hourglass", hourglass)):
        prompts = [_random_text(model, prompt) for prompt, _ in lengths]
        params = [SamplingParams(max_new_tokens=new, ignore_end_of_text=True) for _, new in lengths]
        for way, rows in (("continuous", REQUESTS), ("one at a time", 1)):
            engine = Engine(model, tokenizer, max_rows=rows)
            runs[f"{name}, {way}"] = lambda engine=engine, prompts=prompts, params=params: _engine(
                engine, prompts, params
            )
    llama = as_llama(gpt)
    prompts = [_random_text(gpt, prompt) for prompt, _ in lengths]
    new_tokens = [new for _, new in lengths]
    runs["transformers Llama, one at a time"] = lambda: _one_by_one(llama, prompts, new_tokens)
    runs["transformers Llama, padded batch"] = lambda: _padded(llama, prompts, new_tokens)
    workload = {
        "requests": REQUESTS,
        "prompt_tokens": sum(prompt for prompt, _ in lengths),
        "new_tokens": sum(new_tokens),
        "size": size.name,
    }
    yield from measured(
        "requests",
        workload,
        runs,
        {},
        repeats=options.repeats,
        warmups=0,  # a run is many requests, of which the first warms up
        on_run=lambda name, number: options.on_progress(f"{REQUESTS} requests: {name}, round {number}"),
    )


def _hourglass(layers: int) -> tuple[int, int, int]:
    """Encoder, body and decoder layers."""
    ends = max(1, layers // 6)
    return ends, layers - 2 * ends, ends


def _engine(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> dict[str, float]:
    started = time.perf_counter()
    done = engine.generate(prompts, params)
    seconds = time.perf_counter() - started
    firsts = sorted(completion.first_token_seconds for completion in done)
    return {
        "new_tokens_per_second": sum(completion.usage.new_tokens for completion in done) / seconds,
        "median_first_token_seconds": firsts[len(firsts) // 2],
        "seconds": seconds,
    }


@torch.inference_mode()
def _one_by_one(llama: LlamaForCausalLM, prompts: list[list[int]], new_tokens: list[int]) -> dict[str, float]:
    def work() -> None:
        for prompt, new in zip(prompts, new_tokens, strict=True):
            ids = torch.tensor([prompt])
            llama.generate(  # type: ignore[attr-defined]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )

    seconds = seconds_of(work)
    return {"new_tokens_per_second": sum(new_tokens) / seconds, "seconds": seconds}


@torch.inference_mode()
def _padded(llama: LlamaForCausalLM, prompts: list[list[int]], new_tokens: list[int]) -> dict[str, float]:
    """One batch, padded to the longest prompt; it writes as much as the longest asks for, and what was asked counts."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def work() -> None:
        llama.generate(  # type: ignore[attr-defined]
            ids,
            attention_mask=mask,
            max_new_tokens=max(new_tokens),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    seconds = seconds_of(work)
    return {"new_tokens_per_second": sum(new_tokens) / seconds, "seconds": seconds}

"""Models side by side on one text: time to first token, decoding speed, cache bytes, FLOPs, bits per byte.

Repeats are interleaved, so that whatever else the machine does falls on all models alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thoughtformer.bench.flops import generation_flops
from thoughtformer.engine import Engine
from thoughtformer.errors import InputError
from thoughtformer.evaluate import BitsReport, score_documents, window_sizes
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.sampling import SamplingParams
from thoughtformer.text import SentenceTokenizer, SentencexSplitter

__all__ = ["Comparison", "compare", "split_prompt"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model's figures; times are medians over repeats, with the range."""

    name: str
    text: str
    parameters: int
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    first_token_range: tuple[float, float]
    tokens_per_second: float
    tokens_per_second_range: tuple[float, float]
    cache_bytes: int
    flops: int
    bits_per_byte: float


def split_prompt(text: str, tokenizers: Sequence[SentenceTokenizer], *, max_tokens: int) -> str:
    """The longest run of whole sentences from the start of `text` that fits `max_tokens` for every tokenizer.

    Raises:
        InputError: not even the first sentence fits.
    """
    prompt = ""
    for end in SentencexSplitter().ends(text):
        if any(len(tokenizer(text[:end])["input_ids"]) > max_tokens for tokenizer in tokenizers):
            break
        prompt = text[:end]
    if not prompt:
        raise InputError(f"the text's first sentence doesn't fit {max_tokens} tokens, or there is no text.")
    return prompt


def compare(
    models: Sequence[tuple[str, GPTHFForCausalLM, SentenceTokenizer]],
    prompt: str,
    page: str,
    params: SamplingParams,
    *,
    repeats: int = 5,
    on_text: Callable[[str, str], None] | None = None,
) -> list[Comparison]:
    """Each model's figures on continuing `prompt`, and its bits per byte on `page`.

    Args:
        models: name, model and tokenizer of each.
        prompt: the text to continue.
        page: the text to score.
        params: how to continue it; timing decodes exactly `max_new_tokens`, greedily.
        repeats: timed runs a model, after one to warm up.
        on_text: told (name, piece) of the text as each model first writes it.
    """
    texts = {}
    for name, model, tokenizer in models:
        pieces = []
        for event in Engine(model, tokenizer).stream([prompt], params):
            pieces.append(event.text)
            if on_text is not None:
                on_text(name, event.text)
        texts[name] = "".join(pieces)

    first: dict[str, list[float]] = {name: [] for name, _, _ in models}
    speed: dict[str, list[float]] = {name: [] for name, _, _ in models}
    completions = {}
    for repeat in range(repeats + 1):
        for name, model, tokenizer in models:
            # Greedy, so that every repeat writes the same tokens.
            timed = SamplingParams(max_new_tokens=params.max_new_tokens, ignore_end_of_text=True)
            done = completions[name] = Engine(model, tokenizer).generate([prompt], timed)[0]
            if repeat > 0:
                first[name].append(done.first_token_seconds)
                seconds = done.seconds - done.first_token_seconds
                speed[name].append((done.usage.new_tokens - 1) / seconds if done.usage.new_tokens > 1 else 0.0)

    results = []
    for name, model, tokenizer in models:
        done = completions[name]
        context, stride = window_sizes(model, None, None)
        report = BitsReport.from_scores(
            score_documents(model, tokenizer, [page]), context_tokens=context, stride_tokens=stride
        )
        results.append(
            Comparison(
                name=name,
                text=texts[name],
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                prompt_tokens=done.usage.prompt_tokens,
                new_tokens=done.usage.new_tokens,
                first_token_seconds=statistics.median(first[name]),
                first_token_range=(min(first[name]), max(first[name])),
                tokens_per_second=statistics.median(speed[name]),
                tokens_per_second_range=(min(speed[name]), max(speed[name])),
                cache_bytes=done.cache_bytes,
                flops=generation_flops(model, tokenizer(prompt)["input_ids"], done.ids),
                bits_per_byte=report.bits_per_byte,
            )
        )
    return results

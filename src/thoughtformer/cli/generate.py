"""`thoughtformer generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from thoughtformer.cli.options import AsJson, Extrapolate, Model, Threads, read_text, set_threads
from thoughtformer.errors import InputError

__all__ = ["generate"]


def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; may be empty.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 file, but its last line break.")
    ] = None,
    model: Model = "tiny-gpthf",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most, sentence ends included.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; higher: more varied.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this part of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already seen become less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random stream; the same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; repeatable.")] = None,
    allow_extrapolation: Extrapolate = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text.

    Example: thoughtformer generate --prompt "The sea was calm that morning." --temperature 0.8 --top-p 0.95
    """
    if (prompt is None) == (file is None):
        raise InputError("give the text to continue as either --prompt TEXT or --file FILE.")
    # Editors end a file with a line break that is not meant as text.
    text = prompt if file is None else read_text(file).removesuffix("\n").removesuffix("\r")
    assert text is not None

    from thoughtformer.decode import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    )

    from thoughtformer.engine import Engine
    from thoughtformer.models.loading import load

    set_threads(threads)
    loaded, tokenizer = load(model)
    loaded.config.allow_extrapolation = allow_extrapolation
    engine = Engine(loaded, tokenizer)
    if not as_json:
        for event in engine.stream([text], params):
            sys.stdout.write(event.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    completion = engine.generate([text], params)[0]
    new_tokens = completion.usage.new_tokens
    decode_seconds = completion.seconds - completion.first_token_seconds
    result = {
        "text": completion.text,
        "ids": completion.ids,
        "finish_reason": completion.finish_reason,
        "usage": completion.usage.__dict__,
        "timings": {
            "first_token_seconds": completion.first_token_seconds,
            "total_seconds": completion.seconds,
            "decode_tokens_per_second": (new_tokens - 1) / decode_seconds if new_tokens > 1 else None,
        },
        "bytes": {
            "kv_cache": completion.cache_bytes,
            "weights": sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters()),
        },
    }
    print(json.dumps(result, ensure_ascii=False))

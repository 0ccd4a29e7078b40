"""`thoughtformer generate`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thoughtformer.cli.options import (
    AsJson,
    Encoding,
    Extrapolate,
    Model,
    Threads,
    check_adapter,
    read_text,
    set_threads,
)
from thoughtformer.errors import InputError

if TYPE_CHECKING:
    from thoughtformer.decode import SamplingParams
    from thoughtformer.engine import Engine

__all__ = ["generate"]

NO_PROMPT = "give the text to continue as either --prompt TEXT or --file FILE, or on standard input."


def generate(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; may be empty; - for standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="Read the prompt from a file, but its last line break; - for standard input."
        ),
    ] = None,
    model: Model = "tiny-gpthf",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most, sentence ends included.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; higher: more varied.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this part of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already seen become less likely.")] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the random stream; the same seed gives the same text. Default: another at every run."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string, or at this special token; repeatable.")
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option(
            "--stop-token-id", "--stop-token-ids", help="End at this token too, which isn't shown; repeatable.", min=0
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Never choose an end of the model's own: write on to the limit.")
    ] = False,
    adapter: Annotated[
        str | None,
        typer.Option(help="Fold the context of a plain model with these sentinels.", callback=check_adapter),
    ] = None,
    context: Annotated[Path | None, typer.Option(help="Continue after a context of `compress context`.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Sentence store: sentences in it needn't be read again, others are added.")
    ] = None,
    context_file: Annotated[Path | None, typer.Option(help="UTF-8 text that comes before the prompt.")] = None,
    removed: Annotated[
        float | None,
        typer.Option(
            help="With --adapter: fraction of the tokens seen that is not held; default 0.9.", min=0.0, max=0.99
        ),
    ] = None,
    allow_extrapolation: Extrapolate = False,
    encoding: Encoding = "utf-8",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text.

    Example: thoughtformer generate < prompt.txt

    Example: thoughtformer generate --prompt "The sea was calm that morning." --temperature 0.8 --top-p 0.95

    Example: thoughtformer generate --store sentences --context-file book.txt --prompt "The end of it was that"

    Example: thoughtformer generate --model tiny-gpt --adapter tiny-gpt-sentinel --context book.ctx --prompt "He said"
    """
    was_asked = prompt is not None or file is not None
    if prompt == "-" or (not was_asked and not sys.stdin.isatty()):
        prompt, file = None, Path("-")
    if (prompt is None) == (file is None):
        raise InputError(NO_PROMPT)
    if removed is not None and adapter is None and context is None:
        raise InputError("--removed says how an --adapter folds what it reads: name one.")
    # Editors end a file with a line break that is not meant as text.
    text = prompt if file is None else read_text(file, encoding).removesuffix("\n").removesuffix("\r")
    assert text is not None
    if not text and not was_asked:
        raise InputError(NO_PROMPT)
    if context_file is not None:
        text = read_text(context_file, encoding) + text

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
        stop_token_ids=stop_token_ids or (),
        ignore_end_of_text=ignore_eos,
    )

    set_threads(threads)
    if adapter is not None or context is not None:
        if store is not None:
            raise InputError("--store keeps sentences of a GPTHF; --adapter and --context compress other models.")
        _generate_compressed(text, params, model, adapter, context, removed, allow_extrapolation, as_json)
        return

    from thoughtformer.engine import Engine, SentenceStore
    from thoughtformer.models.loading import load
    from thoughtformer.stores.sentences import storable

    loaded, tokenizer = load(model)
    loaded.config.allow_extrapolation = allow_extrapolation
    if store is not None:
        storable(loaded)
    with nullcontext() if store is None else SentenceStore(store) as opened:
        _generate(Engine(loaded, tokenizer, store=opened), text, params, as_json)


def _generate(engine: Engine, text: str, params: SamplingParams, as_json: bool) -> None:
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
            "weights": sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters()),
        },
    }
    print(json.dumps(result, ensure_ascii=False))


def _generate_compressed(
    text: str,
    params: SamplingParams,
    model: str,
    adapter: str | None,
    context: Path | None,
    removed: float | None,
    allow_extrapolation: bool,
    as_json: bool,
) -> None:
    """The same for a causal LM whose context is folded; transformers' own generate writes."""
    import secrets
    import time

    import torch

    from thoughtformer.cli.compress import open_compressed
    from thoughtformer.compression.context import Context
    from thoughtformer.decode import ends_of
    from thoughtformer.engine import reader_of
    from thoughtformer.text.plain import document_tokenizer

    compressed, tokenizer = open_compressed(
        model,
        adapter,
        removed=removed,
        allow_extrapolation=allow_extrapolation,
        context=context,
    )
    encoder = document_tokenizer(tokenizer)
    ids = encoder.encode_document(text, complete=False, start=context is None).tolist()
    settings: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "do_sample": not params.is_greedy,
        "repetition_penalty": params.repetition_penalty,
    }
    if not params.is_greedy:
        settings |= {"temperature": params.temperature, "top_k": max(params.top_k or 0, 0), "top_p": params.top_p}
        settings |= {"min_p": params.min_p or None}
    reader = reader_of(compressed, tokenizer)
    ends = ends_of(params, end_ids=reader.end_ids, special_tokens=reader.special_tokens, vocab_size=reader.vocab_size)
    settings["eos_token_id"] = sorted(ends.reasons) or None
    if ends.never:
        settings["suppress_tokens"] = list(ends.never)
    if params.stop:
        settings |= {"stop_strings": list(params.stop), "tokenizer": tokenizer}
    torch.manual_seed(secrets.randbits(63) if params.seed is None else params.seed)
    started = time.monotonic()
    with compressed, torch.inference_mode():
        held = (
            Context(compressed, compressed.new_cache(1), []) if context is None else Context.load(compressed, context)
        )
        num_context = len(held.ids)
        cache = held.cache
        whole = torch.tensor([[*held.ids, *ids]])
        if len(ids) == 0:
            raise InputError("give at least one token of --prompt after the context.")
        output = compressed.generate(  # type: ignore[attr-defined]
            whole.to(compressed.device), attention_mask=torch.ones_like(whole), cache=cache, **settings
        )
        new = output[0, whole.shape[1] :].tolist()
        entries, num_bytes = int(cache.num_entries[0]), cache.num_bytes()
    written = encoder.decode(new[:-1] if new and new[-1] in ends.reasons else new)
    for stop in params.stop:
        written = written.split(stop)[0]
    if not as_json:
        print(written)
        return
    result = {
        "text": written,
        "ids": new,
        "usage": {"context_tokens": num_context, "prompt_tokens": len(ids), "new_tokens": len(new)},
        "entries": entries,
        "bytes": {"kv_cache": num_bytes},
        "seconds": time.monotonic() - started,
    }
    print(json.dumps(result, ensure_ascii=False))

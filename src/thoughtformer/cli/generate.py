"""`thoughtformer generate`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thoughtformer.cli.opening import Compression, open_model, takes_compression
from thoughtformer.cli.options import AsJson, Drafts, Encoding, Extrapolate, Model, Threads, read_text, set_threads
from thoughtformer.errors import InputError

if TYPE_CHECKING:
    from thoughtformer.compression import Context
    from thoughtformer.engine import Scheduler
    from thoughtformer.engine.request import Request
    from thoughtformer.sampling import SamplingParams

__all__ = ["generate"]

NO_PROMPT = "give the text to continue as either --prompt TEXT or --file FILE, or on standard input."


@takes_compression
def generate(
    *,
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
    context: Annotated[Path | None, typer.Option(help="Continue after a context of `compress context`.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Sentence store: sentences in it needn't be read again, others are added.")
    ] = None,
    context_file: Annotated[Path | None, typer.Option(help="UTF-8 text that comes before the prompt.")] = None,
    drafts: Drafts = "off",
    allow_extrapolation: Extrapolate = False,
    encoding: Encoding = "utf-8",
    threads: Threads = None,
    as_json: AsJson = False,
    compression: Compression,
) -> None:
    """Continue a text.

    Example: thoughtformer generate < prompt.txt

    Example: thoughtformer generate --prompt "The sea was calm that morning." --temperature 0.8 --top-p 0.95

    Example: thoughtformer generate --store sentences --context-file book.txt --prompt "The end of it was that"

    Example: thoughtformer generate --model tiny-gpt --adapter tiny-gpt-sentinel --context book.ctx --prompt "He said"

    Example: thoughtformer generate --model my-llama --method streaming --max-entries 256 < prompt.txt
    """
    was_asked = prompt is not None or file is not None
    if prompt == "-" or (not was_asked and not sys.stdin.isatty()):
        prompt, file = None, Path("-")
    if (prompt is None) == (file is None):
        raise InputError(NO_PROMPT)
    asked = compression.on(context)
    # Editors end a file with a line break that is not meant as text.
    text = prompt if file is None else read_text(file, encoding).removesuffix("\n").removesuffix("\r")
    assert text is not None
    if not text and not was_asked:
        raise InputError(NO_PROMPT)
    if context_file is not None:
        text = read_text(context_file, encoding) + text

    from thoughtformer.sampling import SamplingParams

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
    if store is not None and asked.is_asked:
        raise InputError("--store keeps sentences of a GPTHF; --method, --adapter and --context compress other models.")

    from thoughtformer.compression import CompressedModel, Context
    from thoughtformer.decode import StepCosts, drafters_of
    from thoughtformer.engine import Limits, Scheduler, SentenceStore, runner_of
    from thoughtformer.stores.sentences import storable

    opened, tokenizer = open_model(model, asked, allow_extrapolation=allow_extrapolation)
    if store is not None:
        storable(opened)  # before a store is made
    with ExitStack() as stack:
        known = None if store is None else stack.enter_context(SentenceStore(store)).of(opened)
        runner = runner_of(opened, tokenizer, sentences=known)
        scheduler = Scheduler(runner, Limits(max_rows=1), drafters=drafters_of(drafts), costs=StepCosts())
        if context is None:
            request = scheduler.prepare(text, params)
        else:
            assert isinstance(opened, CompressedModel)
            request = _continued(scheduler, Context.load(opened, context), text, params)
        request.keeps_cache = as_json
        scheduler.enqueue([request])
        while scheduler.has_work:
            for event in scheduler.round():
                if not as_json:
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
            if request.error is not None:
                raise request.error
        if as_json:
            num_context = None if context is None else request.num_known
            print(json.dumps(_result(scheduler, request, num_context=num_context), ensure_ascii=False))
        else:
            sys.stdout.write("\n")


def _continued(scheduler: Scheduler, context: Context, text: str, params: SamplingParams) -> Request:
    """A request that goes on from a context."""
    new = scheduler.runner.encode(text, start=False)
    if not new:
        raise InputError("give at least one token of --prompt after the context.")
    request = scheduler.prepare([*context.ids, *new], params)
    request.go_on_from(context.cache, len(context.ids))
    return request


def _result(scheduler: Scheduler, request: Request, *, num_context: int | None) -> dict[str, Any]:
    """What came of a request, for programs."""
    completion, model = scheduler.completion(request), scheduler.runner.model
    usage = dict(completion.usage.__dict__)
    if num_context is not None:
        usage |= {
            "context_tokens": num_context,
            "prompt_tokens": usage["prompt_tokens"] - num_context,
            "cached_prompt_tokens": usage["cached_prompt_tokens"] - num_context,
        }
    decode_seconds, new_tokens = completion.seconds - completion.first_token_seconds, usage["new_tokens"]
    result = {
        "text": completion.text,
        "ids": completion.ids,
        "finish_reason": completion.finish_reason,
        "usage": usage,
        "timings": {
            "first_token_seconds": completion.first_token_seconds,
            "total_seconds": completion.seconds,
            "decode_tokens_per_second": (new_tokens - 1) / decode_seconds if new_tokens > 1 else None,
        },
        "bytes": {
            "kv_cache": completion.cache_bytes,
            "weights": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        },
    }
    entries = getattr(request.cache, "num_entries", None)
    return result if entries is None else result | {"entries": int(entries[0])}

"""`thoughtformer demo`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thoughtformer.cli.options import AsJson, Encoding, Threads, read_text, set_threads

if TYPE_CHECKING:
    from thoughtformer.bench import Comparison

__all__ = ["demo"]


def demo(
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Continue and score this text instead.")] = None,
    encoding: Encoding = "utf-8",
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write; default: 128.", min=2)] = None,
    temperature: Annotated[float, typer.Option(help="Of the text shown; the timed runs are greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the text shown.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="32 tokens, timed once: to see that all runs.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue one text with the bundled GPTHF and its plain GPT, and compare what it cost.

    Example: thoughtformer demo --file chapter.txt
    """
    from thoughtformer.bench import compare, split_prompt
    from thoughtformer.models.loading import ASSETS, BUNDLED, load_gpthf
    from thoughtformer.sampling import SamplingParams

    set_threads(threads)
    if max_new_tokens is None:
        max_new_tokens = 32 if quick else 128
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=0.95, seed=seed)
    page = read_text(ASSETS / "page.txt") if file is None else read_text(file, encoding)
    models = [(name, *load_gpthf(name)) for name in BUNDLED]
    limit = min(model.config.max_position_embeddings for _, model, _ in models)
    prompt = split_prompt(page, [tokenizer for _, _, tokenizer in models], max_tokens=limit - max_new_tokens)

    current = ""

    def show(name: str, piece: str) -> None:
        nonlocal current
        if name != current:
            sys.stdout.write(f"\n\n== {name} goes on:\n\n... {prompt[-160:].lstrip()}\n--------\n")
            current = name
        sys.stdout.write(piece)
        sys.stdout.flush()

    results = compare(models, prompt, page, params, repeats=1 if quick else 5, on_text=None if as_json else show)
    if as_json:
        print(json.dumps([asdict(result) for result in results], ensure_ascii=False))
        return
    print("\n\nmeasuring done; medians, with the range in brackets\n")
    _table(results)


def _table(results: list[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    compressed, plain = results
    table = Table()
    for heading in ("", compressed.name, plain.name, "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")

    def milliseconds(value: Comparison) -> str:
        low, high = value.first_token_range
        return f"{value.first_token_seconds * 1e3:.1f} ms [{low * 1e3:.1f}, {high * 1e3:.1f}]"

    def speed(value: Comparison) -> str:
        low, high = value.tokens_per_second_range
        return f"{value.tokens_per_second:.0f} [{low:.0f}, {high:.0f}]"

    rows = [
        ("time to first token", milliseconds, "first_token_seconds"),
        ("tokens/s after it", speed, "tokens_per_second"),
        ("KV-cache bytes at the end", lambda value: f"{value.cache_bytes:,}", "cache_bytes"),
        ("GFLOPs, prompt and new tokens", lambda value: f"{value.flops / 1e9:.2f}", "flops"),
        ("bits per byte of the page", lambda value: f"{value.bits_per_byte:.3f}", "bits_per_byte"),
        ("parameters", lambda value: f"{value.parameters:,}", "parameters"),
        ("prompt tokens", lambda value: f"{value.prompt_tokens}", "prompt_tokens"),
        ("new tokens", lambda value: f"{value.new_tokens}", "new_tokens"),
    ]
    for label, show, field in rows:
        ratio = getattr(compressed, field) / getattr(plain, field)
        table.add_row(label, show(compressed), show(plain), f"{ratio:.2f}")
    Console(width=100).print(table)

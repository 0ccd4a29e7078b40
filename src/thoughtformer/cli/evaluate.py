"""`thoughtformer eval`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from thoughtformer.cli.options import AsJson, Column, Data, Extrapolate, Model, Threads, set_threads

__all__ = ["evaluate"]


def evaluate(
    data: Data,
    model: Model = "tiny-gpthf",
    context_tokens: Annotated[int | None, typer.Option(help="Window; default: the trained length.", min=2)] = None,
    stride_tokens: Annotated[int | None, typer.Option(help="Tokens a window adds; default: half of it.", min=1)] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop at the document that reaches this.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Windows computed together; changes no figure.", min=1)] = 8,
    column: Column = "text",
    allow_extrapolation: Extrapolate = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure bits per byte of the original text, and perplexities.

    Example: thoughtformer eval --model tiny-gpthf --data valid.txt --json
    """
    from rich.console import Console

    from thoughtformer.evaluate import BitsReport, score_documents, window_sizes
    from thoughtformer.models.loading import load
    from thoughtformer.text.corpus import Corpus

    set_threads(threads)
    corpus = Corpus(sources=data, column=column, max_bytes=max_bytes)
    loaded, tokenizer = load(model)
    loaded.config.allow_extrapolation = allow_extrapolation
    context, stride = window_sizes(loaded, context_tokens, stride_tokens)
    console, scores, done = Console(stderr=True, highlight=False), [], 0
    with console.status("evaluating") as status:
        for score in score_documents(
            loaded, tokenizer, corpus, context_tokens=context, stride_tokens=stride, batch_size=batch_size
        ):
            scores.append(score)
            done += score.num_bytes
            status.update(f"evaluating: {len(scores):,} documents, {done / 1e6:,.2f} MB")
    report = BitsReport.from_scores(scores, context_tokens=context, stride_tokens=stride)
    if as_json:
        print(json.dumps({"model": model, "data": data, **asdict(report)}))
        return
    print(f"bits per byte              {report.bits_per_byte:.4f}")
    print(
        f"  over {report.num_documents} documents       mean {report.document_mean:.4f}, standard deviation "
        f"{report.document_std:.4f}, median {report.document_median:.4f}"
    )
    print(f"perplexity of real tokens  {report.token_perplexity:.2f}")
    if report.sentence_end_perplexity is not None:
        print(
            f"perplexity of sentence ends {report.sentence_end_perplexity:.2f} "
            f"({report.bits_of_sentence_ends_fraction:.1%} of all bits)"
        )
    print(
        f"{report.num_bytes:,} bytes, {report.num_tokens:,} tokens, {report.num_sentence_ends:,} sentence ends; "
        f"windows of {report.context_tokens} tokens, stride {report.stride_tokens}"
    )

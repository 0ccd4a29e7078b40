"""`thoughtformer eval`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from thoughtformer.cli.options import (
    AsJson,
    Column,
    Data,
    Encoding,
    Extrapolate,
    Model,
    Threads,
    Working,
    check_source,
    counted,
    set_threads,
)

__all__ = ["evaluate"]


def evaluate(
    data: Data,
    model: Model = "tiny-gpthf",
    context_tokens: Annotated[int | None, typer.Option(help="Window; default: the trained length.", min=2)] = None,
    stride_tokens: Annotated[int | None, typer.Option(help="Tokens a window adds; default: half of it.", min=1)] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop at the document that reaches this.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Windows computed together; changes no figure.", min=1)] = 8,
    column: Column = "text",
    encoding: Encoding = "utf-8",
    profiles: Annotated[
        bool, typer.Option("--profiles", help="Also bits by place in the sentence, and by what was read before.")
    ] = False,
    allow_extrapolation: Extrapolate = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure bits per byte of the original text, and perplexities.

    Example: thoughtformer eval --model tiny-gpthf --data valid.txt --json
    """
    for source in data:
        check_source(source)

    from thoughtformer.evaluate import BitsReport, document_bits, window_sizes
    from thoughtformer.evaluate.profile import LossProfile, sentence_places
    from thoughtformer.models.loading import load_gpthf, load_tokenizer
    from thoughtformer.text.corpus import Corpus

    set_threads(threads)
    corpus = Corpus(sources=data, column=column, max_bytes=max_bytes, encoding=encoding)
    loaded, tokenizer = load_gpthf(model)
    loaded.config.allow_extrapolation = allow_extrapolation
    context, stride = window_sizes(loaded, context_tokens, stride_tokens)
    # Sentences are told by one that writes their ends, also for a model that reads none.
    with_ends = load_tokenizer(model, insert_sentence_ends=True)
    scores, profile, done = [], LossProfile(), 0
    with Working("evaluating") as status:
        for document in corpus:
            bits = document_bits(
                loaded, tokenizer, document, context_tokens=context, stride_tokens=stride, batch_size=batch_size
            )
            if profiles:
                places = sentence_places(with_ends, document, context_tokens=context, stride_tokens=stride)
                profile.add(bits, places)
            scores.append(bits.score())
            done += bits.num_bytes
            status.update(f"evaluating: {counted(len(scores), 'document')}, {done / 1e6:,.2f} MB")
    report = BitsReport.from_scores(scores, context_tokens=context, stride_tokens=stride)
    means = profile.bits_per_token() if profiles else {}
    if as_json:
        print(json.dumps({"model": model, "data": data, **asdict(report), **means}))
        return
    print(f"bits per byte              {report.bits_per_byte:.4f}")
    print(
        f"  over {counted(report.num_documents, 'document')}       mean {report.document_mean:.4f}, standard deviation "
        f"{report.document_std:.4f}, median {report.document_median:.4f}"
    )
    print(f"perplexity of real tokens  {report.token_perplexity:.2f}")
    if report.sentence_end_perplexity is not None:
        print(
            f"perplexity of sentence ends {report.sentence_end_perplexity:.2f} "
            f"({report.bits_of_sentence_ends_fraction:.1%} of all bits)"
        )
    print(
        f"{counted(report.num_bytes, 'byte')}, {counted(report.num_tokens, 'token')}, "
        f"{counted(report.num_sentence_ends, 'sentence end')}; "
        f"windows of {report.context_tokens} tokens, stride {report.stride_tokens}"
    )
    for name, values in means.items():
        _print_profile(name, values)


#: What each profile counts.
COUNTED = {
    "by_offset": "tokens before it in its sentence",
    "by_earlier": "sentences before its own in the window",
    "by_repeat": "sentences since the same pair of tokens was read",
}


def _print_profile(name: str, means: list[float | None]) -> None:
    from thoughtformer.evaluate.profile import PROFILES

    print(f"bits a token, by {COUNTED[name]}")
    print("  " + "".join(f"{label:>7}" for label in PROFILES[name]))
    print("  " + "".join(f"{'' if bits is None else f'{bits:.2f}':>7}" for bits in means))

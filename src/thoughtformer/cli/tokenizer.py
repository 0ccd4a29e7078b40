"""`thoughtformer tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thoughtformer.cli.options import Column, Data, Encoding, Working, check_source
from thoughtformer.errors import OutputError

__all__ = ["tokenizer_app"]

tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)


@tokenizer_app.callback()
def _tokenizer() -> None:
    pass


@tokenizer_app.command("train")
def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="New or empty folder.")],
    vocab_size: Annotated[int, typer.Option(help="Ids, 256 bytes and 3 special tokens included.")] = 8192,
    max_bytes: Annotated[int | None, typer.Option(help="Text to take, in equal shares of the sources.", min=1)] = None,
    sentence_ends: Annotated[bool, typer.Option(help="Write sentence ends, as GPTHF needs.")] = True,
    max_sentence_tokens: Annotated[int, typer.Option(help="Close longer sentences by force.", min=2)] = 256,
    language: Annotated[str, typer.Option(help="ISO 639 code, for splitting sentences.")] = "en",
    column: Column = "text",
    encoding: Encoding = "utf-8",
) -> None:
    """Train a byte-level BPE tokenizer.

    Example: thoughtformer tokenizer train --data books/ --vocab-size 16384 --out my-tokenizer
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not an empty folder: name another.")

    for source in data:
        check_source(source)

    from thoughtformer.text import SentenceTokenizer, train_bpe
    from thoughtformer.text.corpus import Corpus

    corpus = Corpus(sources=data, column=column, max_bytes=max_bytes, encoding=encoding)
    with Working("training a tokenizer"):
        backend = train_bpe(corpus, vocab_size)
    tokenizer = SentenceTokenizer.from_backend(
        backend,
        insert_sentence_ends=sentence_ends,
        max_sentence_tokens=max_sentence_tokens,
        language=language,
    )
    try:
        tokenizer.save_pretrained(str(out))
    except OSError as error:
        raise OutputError(f"can't write to {out}: {error}") from None
    missing = "" if len(tokenizer) == vocab_size else f", not {vocab_size:,}: no more pairs occur often enough"
    print(f"{out}: {len(tokenizer):,} tokens{missing}")

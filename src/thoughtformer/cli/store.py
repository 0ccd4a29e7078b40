"""`thoughtformer index` and `thoughtformer store`: sentences encoded once, for every later prompt."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thoughtformer.cli.options import (
    AsJson,
    Column,
    Encoding,
    Model,
    Threads,
    Working,
    check_source,
    counted,
    set_threads,
    shown_size,
)
from thoughtformer.errors import InputError

if TYPE_CHECKING:
    from thoughtformer.engine import SentenceStore
    from thoughtformer.stores.indexing import IndexResult

__all__ = ["index", "store_app"]

store_app = typer.Typer(help="Look after a sentence store.")

Folder = Annotated[Path, typer.Argument(help="The store's folder.")]
MaxSize = Annotated[
    str | None,
    typer.Option("--max-size", help="Bytes used at most, e.g. 500MB or 8GiB; the least recently used sentences go."),
]
UNITS = {
    "": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str | None, option: str = "--max-size") -> int | None:
    """Bytes of `500MB` or `8GiB`; raises `InputError`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b|b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise InputError(f"{option} {text!r} is no size: write bytes, or a number with KB, MB, GB, KiB, MiB, GiB.")
    return int(float(match[1]) * UNITS[(match[2] or "").upper()])


def index(
    data: Annotated[list[str], typer.Argument(help="Files and folders of text, as for training.")],
    store: Annotated[Path, typer.Option(help="The store's folder; made if it isn't there.")],
    model: Model = "tiny-gpthf",
    max_size: MaxSize = None,
    column: Column = "text",
    encoding: Encoding = "utf-8",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Encode every sentence of some texts once; prompts that hold them are then read many times as fast.

    Example: thoughtformer index --model runs/mine --store sentences docs/ books/*.txt

    Example: thoughtformer generate --model runs/mine --store sentences --context-file books/one.txt --prompt "He said"
    """
    import time

    for source in data:
        check_source(source)

    from thoughtformer.engine import SentenceStore
    from thoughtformer.models.loading import load_gpthf
    from thoughtformer.stores.indexing import index_documents
    from thoughtformer.stores.sentences import storable
    from thoughtformer.text.corpus import Corpus

    max_bytes = parse_size(max_size)
    set_threads(threads)
    corpus = Corpus(sources=list(data), column=column, encoding=encoding)
    loaded, tokenizer = load_gpthf(model)
    storable(loaded)
    started = time.monotonic()
    with SentenceStore(store, max_bytes=max_bytes) as opened, Working("reading") as status:

        def told(result: IndexResult) -> None:
            status.update(f"{counted(result.documents, 'document')}, {counted(result.sentences, 'sentence')}")

        result = index_documents(loaded, tokenizer, opened, corpus, on_progress=told)
        used = opened.stats().used_bytes
    seconds = time.monotonic() - started
    if as_json:
        print(json.dumps(asdict(result) | {"used_bytes": used, "seconds": seconds}))
        return
    status.console.print(
        f"{counted(result.documents, 'document')}, {counted(result.tokens, 'token')}, "
        f"{counted(result.sentences, 'sentence')}: {counted(result.new_vectors, 'vector')} new, "
        f"in {seconds:.1f} s. {store} uses {shown_size(used)}."
    )


@store_app.command("stats")
def stats(folder: Folder, as_json: AsJson = False) -> None:
    """Say what a store holds.

    Example: thoughtformer store stats sentences
    """
    with _existing(folder) as store:
        stats = store.stats()
    if as_json:
        print(json.dumps(asdict(stats)))
        return
    used, size = shown_size(stats.used_bytes), shown_size(stats.file_bytes)
    print(f"{counted(stats.sentences, 'sentence')}, {used} used of a file of {size}")
    for model in stats.models:
        count, size = counted(model.sentences, "sentence"), shown_size(model.vector_bytes)
        print(f"{model.fingerprint}  {model.dtype}  {count}, {size}")


@store_app.command("verify")
def verify(folder: Folder) -> None:
    """Check every vector's checksum; exits with 1 if some are damaged.

    Damaged vectors are never used: their sentences are read anew.

    Example: thoughtformer store verify sentences
    """
    with _existing(folder) as store, Working("checking every vector"):
        damaged, count = store.verify(), store.stats().sentences
    print(f"{counted(count, 'sentence')}, {damaged:,} damaged")
    if damaged:
        raise typer.Exit(1)


@store_app.command("prune")
def prune(
    folder: Folder,
    max_size: MaxSize = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Fingerprint of a model whose sentences stay; repeatable. Others' go.")
    ] = None,
) -> None:
    """Remove sentences, and give their room back.

    Example: thoughtformer store prune sentences --max-size 1GB
    """
    if max_size is None and not keep:
        raise InputError("say what to remove: --max-size SIZE, --keep FINGERPRINT, or both.")
    with _existing(folder) as store:
        known = [model.fingerprint for model in store.stats().models]
        for fingerprint in keep or ():
            if fingerprint not in known:
                raise InputError(f"--keep {fingerprint}: the store has {', '.join(known) or 'no model'}.")
        removed = store.prune(max_bytes=parse_size(max_size), keep=keep)
        stats = store.stats()
    print(f"{counted(removed, 'sentence')} removed, {stats.sentences:,} left, {shown_size(stats.file_bytes)}")


def _existing(folder: Path) -> SentenceStore:
    from thoughtformer.engine import SentenceStore
    from thoughtformer.stores.vectors import FILE

    if not (folder / FILE).exists():
        raise InputError(f"{folder} holds no sentence store: `thoughtformer index --store {folder} ...` makes one.")
    return SentenceStore(folder)

"""`thoughtformer compress`: train sentinels, compare methods, keep contexts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thoughtformer.cli.opening import Compression, open_model, takes_compression
from thoughtformer.cli.options import (
    DATA,
    AsJson,
    Column,
    Data,
    Encoding,
    Extrapolate,
    Threads,
    TrainingStatus,
    Working,
    check_adapter,
    check_methods,
    check_model,
    check_source,
    counted,
    read_text,
    set_threads,
)
from thoughtformer.cli.tasks import evaluate_tasks
from thoughtformer.errors import ConfigError, InputError

if TYPE_CHECKING:
    from thoughtformer.evaluate.compression import MethodScore

__all__ = ["compress_app"]

compress_app = typer.Typer(help="Fold the context of a causal LM: train sentinels, compare methods, keep contexts.")

Base = Annotated[
    str,
    typer.Option("--model", "-m", help="tiny-gpt, or a folder with a causal LM of transformers.", callback=check_model),
]


@compress_app.command("train")
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the adapter: new or empty, or see --resume.")],
    model: Base = "tiny-gpt",
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Recipe in a YAML or JSON file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: max_steps=500, adapter.num_sentinels=2.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Write the adapter in float16.")] = False,
    column: Column = "text",
    encoding: Encoding = "utf-8",
    threads: Threads = None,
) -> None:
    """Train sentinels, and LoRA, for a model; the same command runs under torchrun.

    Example: thoughtformer compress train --model tiny-gpt --data books/ --out runs/sentinel --set max_steps=500
    """
    from thoughtformer.recipes import tiny_gpt_sentinel
    from thoughtformer.train.adapter_rows import AdapterRecipe
    from thoughtformer.train.compress import train_adapter
    from thoughtformer.train.folder import RESULT_FILE

    recipe = tiny_gpt_sentinel() if model == "tiny-gpt" else AdapterRecipe()
    recipe = (AdapterRecipe.from_file(config) if config is not None else recipe).with_settings(settings or [])
    set_threads(threads)
    was_finished = resume and (out / RESULT_FILE).exists()
    with TrainingStatus(out, recipe.save_every_steps) as status:
        result = train_adapter(
            recipe,
            model,
            data,
            out,
            resume=resume,
            overwrite=overwrite,
            column=column,
            encoding=encoding,
            half=half,
            on_tokenised=status.told,
            on_start=status.begins,
        )
    status.console.print(
        f"{out}{', finished before' if was_finished else ''}: {counted(result.steps, 'step')}, "
        f"{counted(result.rows, 'row')}, loss {result.last_loss or result.mean_loss:.4f}, "
        f"{counted(result.trained_parameters, 'parameter')} trained; removed: asked "
        f"for {result.nominal_removed:.3f}, reached {result.achieved_removed:.3f} at the rows' ends and "
        f"{result.average_removed:.3f} on average"
    )


def _numbers(text: str, name: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--{name} {text!r}: write numbers with commas between, e.g. 0.5,0.9.") from None


@compress_app.command("eval")
def evaluate(
    data: Annotated[list[str] | None, DATA] = None,
    model: Base = "tiny-gpt",
    adapter: Annotated[
        str | None,
        typer.Option(help="Sentinels: tiny-gpt-sentinel, or a folder of `compress train`.", callback=check_adapter),
    ] = None,
    methods: Annotated[str, typer.Option(help="all, or names with commas between.", callback=check_methods)] = "all",
    removed: Annotated[str, typer.Option(help="Fractions removed, with commas between.")] = "0.3,0.5,0.7,0.9",
    context_tokens: Annotated[int | None, typer.Option(help="Block; default: the trained length.", min=4)] = None,
    num_blocks: Annotated[int, typer.Option(help="Blocks a seed.", min=1)] = 16,
    seeds: Annotated[str, typer.Option(help="Each draws blocks of its own, and a random method's numbers.")] = "0,1,2",
    span_tokens: Annotated[
        int | None, typer.Option(help="Tokens folded at a time; default: by the fraction removed.", min=2)
    ] = None,
    with_adapter: Annotated[
        bool, typer.Option("--with-adapter", help="Run all methods on the adapter's LoRA: what training alone brought.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of --data: all, or names with commas between: what a context is kept for."),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop at the document that reaches this.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks computed together; changes no figure.", min=1)] = 8,
    column: Column = "text",
    encoding: Encoding = "utf-8",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods at equal numbers of entries held, on the same scored tokens: the second half of each block.

    With --tasks, on generated texts, by the answers that they end with: num_blocks texts a seed of context_tokens each.

    Example: thoughtformer compress eval --model tiny-gpt --adapter tiny-gpt-sentinel --data valid.txt --json
    """
    if (not data) == (tasks is None):
        raise InputError("give --data, or --tasks.")
    data = data or []
    for source in data:
        check_source(source)

    from rich.console import Console
    from rich.table import Table

    from thoughtformer.compression import METHODS
    from thoughtformer.evaluate.compression import sample_blocks, summarise
    from thoughtformer.models.loading import load
    from thoughtformer.text.corpus import Corpus
    from thoughtformer.text.plain import document_tokenizer

    names = methods.split(",")
    if methods == "all":
        names = [name for name, method in METHODS.items() if adapter or not method.needs_adapter]
    if adapter is None and (with_adapter or any(METHODS[name].needs_adapter for name in names)):
        raise InputError("give the sentinels' --adapter.")
    fractions, seed_numbers = _numbers(removed, "removed", float), _numbers(seeds, "seeds", int)
    if not fractions or not seed_numbers:
        raise InputError("give at least one fraction and one seed.")
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise InputError(f"--removed {fraction}: fractions lie between 0 and 1.")
    set_threads(threads)
    if tasks is not None:
        if with_adapter:
            raise InputError("--with-adapter goes with --data.")
        evaluate_tasks(
            model,
            adapter,
            names,
            fractions,
            tasks,
            context_tokens=context_tokens,
            num_texts=num_blocks,
            seeds=seed_numbers,
            span_tokens=span_tokens,
            as_json=as_json,
        )
        return
    corpus = Corpus(sources=data, column=column, max_bytes=max_bytes, encoding=encoding)
    loaded, tokenizer = load(model)
    samples = sample_blocks(
        corpus,
        document_tokenizer(tokenizer),
        context_tokens=context_tokens if context_tokens is not None else loaded.config.max_position_embeddings,
        num_blocks=num_blocks,
        seeds=seed_numbers,
    )
    scores: list[MethodScore] = []
    skipped: list[dict[str, Any]] = []
    with Working("evaluating") as status:
        for score in _scores(
            loaded,
            adapter,
            names,
            fractions,
            samples,
            tokenizer=tokenizer,
            span_tokens=span_tokens,
            lora=with_adapter,
            batch_size=batch_size,
        ):
            if isinstance(score, dict):
                skipped.append(score)
                continue
            scores.append(score)
            status.update(f"evaluating: {score.method} at {score.removed:.0%}, seed {score.seed}")
    if not scores:
        raise ConfigError(" ".join(dict.fromkeys(skip["why"] for skip in skipped)))
    for skip in skipped:
        print(f"thoughtformer: {skip['method']} at {skip['removed']:.0%} is left out: {skip['why']}", file=sys.stderr)
    summary = list(summarise(scores))
    if as_json:
        values = {"model": model, "adapter": adapter, "data": data, "with_adapter": with_adapter}
        results = {"summary": summary, "scores": [asdict(score) for score in scores], "skipped": skipped}
        print(json.dumps(values | results))
        return
    table = Table(title=f"bits per byte, {len(seed_numbers)} samples of {num_blocks} blocks")
    for heading in ("method", "removed", "bits per byte", "spread", "entries", "peak"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for line in summary:
        table.add_row(
            line["method"],
            f"{line['achieved_removed']:.1%}",
            f"{line['bits_per_byte']:.4f}",
            f"{line['bits_per_byte_std']:.4f}",
            f"{line['mean_entries']:.1f}",
            str(line["peak_entries"]),
        )
    Console().print(table)


def _scores(
    loaded: Any,
    adapter: str | None,
    names: list[str],
    fractions: list[float],
    samples: dict[int, Any],
    *,
    tokenizer: Any,
    span_tokens: int | None,
    lora: bool,
    batch_size: int,
) -> Iterator[MethodScore | dict[str, Any]]:
    """Scores; and for what can't hold as many entries, the method, the fraction, and why."""
    from thoughtformer.compression import compress
    from thoughtformer.compression.adapter import SentinelAdapter
    from thoughtformer.compression.registry import trained_with
    from thoughtformer.evaluate.compression import score_method, solve
    from thoughtformer.models.backbone import backbone_of
    from thoughtformer.models.fingerprint import fingerprint
    from thoughtformer.models.loading import BUNDLED_ADAPTERS, resolve

    sentinels = trained_with(adapter)
    injected = None
    if lora and adapter is not None:
        injected = SentinelAdapter.load(
            backbone_of(loaded), resolve(adapter, BUNDLED_ADAPTERS), fingerprint=fingerprint(loaded)
        )
    try:
        for seed, blocks in samples.items():
            for fraction in [0.0, *fractions] if "full" in names else fractions:
                for name in names:
                    if (name == "full") != (fraction == 0):
                        continue
                    try:
                        method = solve(
                            name,
                            fraction,
                            blocks,
                            seed=seed,
                            span_tokens=span_tokens,
                            trained=sentinels,
                            tokenizer=tokenizer,
                        )
                    except ConfigError as error:
                        yield {"method": name, "removed": fraction, "seed": seed, "why": str(error)}
                        continue
                    own = None if not method.needs_adapter else injected if injected is not None else adapter
                    compressed = compress(loaded, method, adapter=own)
                    yield score_method(compressed, blocks, removed=fraction, seed=seed, batch_size=batch_size)
                    if compressed.adapter is not injected:
                        compressed.close()
    finally:
        if injected is not None:
            injected.remove()


@compress_app.command("context")
@takes_compression
def context(
    *,
    file: Annotated[Path, typer.Option("--file", "-f", help="UTF-8 text to read.")],
    out: Annotated[Path, typer.Option(help="File for the context, e.g. book.ctx.")],
    model: Base = "tiny-gpt",
    append: Annotated[Path | None, typer.Option(help="Read on from this context instead of anew.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    allow_extrapolation: Extrapolate = False,
    encoding: Encoding = "utf-8",
    threads: Threads = None,
    as_json: AsJson = False,
    compression: Compression,
) -> None:
    """Read a text once and keep it compressed, to be asked many times with `generate --context`.

    Example: thoughtformer compress context --adapter tiny-gpt-sentinel --file chapter.txt --out chapter.ctx
    """
    from thoughtformer.errors import OutputError

    asked = compression.on(append)
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists. Replace it with --overwrite, or name another.")
    if not asked.is_asked:
        raise InputError("say how the context is kept: give a --method, or the sentinels' --adapter.")
    text = read_text(file, encoding)
    from thoughtformer.compression import CompressedModel, Context
    from thoughtformer.text.plain import document_tokenizer

    set_threads(threads)
    compressed, tokenizer = open_model(model, asked, allow_extrapolation=allow_extrapolation)
    assert isinstance(compressed, CompressedModel)
    with compressed, Working(f"reading {file}"):
        ids = document_tokenizer(tokenizer).encode_document(text, complete=False, start=append is None).tolist()
        if append is None:
            context = Context.read(compressed, ids)
        else:
            context = Context.load(compressed, append)
            context.append(ids)
        context.save(out)
    tokens, entries = len(context.ids), int(context.cache.num_entries[0])
    result = {
        "tokens": tokens,
        "entries": entries,
        "removed": 1 - entries / tokens,
        "cache_bytes": context.num_bytes(),
        "file_bytes": out.stat().st_size,
    }
    if as_json:
        print(json.dumps(result))
        return
    share, size = result["removed"], result["file_bytes"]
    print(f"{out}: {tokens:,} tokens in {entries:,} entries ({share:.1%} removed), {size:,} bytes")

"""`thoughtformer bench`: measure, beside peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thoughtformer.cli.options import (
    AsJson,
    Column,
    Data,
    Encoding,
    Threads,
    Working,
    check_cases,
    check_methods,
    set_threads,
)
from thoughtformer.errors import InputError

if TYPE_CHECKING:
    from thoughtformer.bench.records import Record

__all__ = ["bench_app", "run_cases"]

bench_app = typer.Typer(help="Measure speed, memory, FLOPs and quality beside peers with KV caches.")

SpeedCases = Annotated[
    list[str] | None, typer.Option("--case", help="Only this case; repeatable.", callback=check_cases("speed"))
]
MemoryCases = Annotated[
    list[str] | None, typer.Option("--case", help="Only this case; repeatable.", callback=check_cases("memory"))
]
QualityCases = Annotated[
    list[str] | None, typer.Option("--case", help="Only this case; repeatable.", callback=check_cases("quality"))
]
SizeName = Annotated[str, typer.Option("--size", help="full: 12 layers, d 768; toy: to see that all runs.")]
Repeats = Annotated[int, typer.Option(help="Timed, interleaved rounds.", min=1)]
Contexts = Annotated[str | None, typer.Option(help="Context lengths with commas between, instead of the case's own.")]
Out = Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")]


@bench_app.command("speed")
def speed(
    case: SpeedCases = None,
    size: SizeName = "full",
    repeats: Repeats = 5,
    contexts: Contexts = None,
    out: Out = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Prefill and decode: GPTHF, the plain GPT, transformers' Llama, llama.cpp. Cases: prefill, decode, batch1, batch8,
    packed, compressed, architectures, requests, known.

    Example: thoughtformer bench speed --case prefill --contexts 1024,4096 --out speed.jsonl
    """
    from thoughtformer.bench.speed import CASES

    run_cases(CASES, case, _options(size, repeats, contexts, threads, case), out, as_json)


@bench_app.command("memory")
def memory(
    case: MemoryCases = None,
    size: SizeName = "full",
    repeats: Repeats = 3,
    contexts: Contexts = None,
    out: Out = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Bytes of keys and values against their formula, and peak resident memory. Cases: kv_bytes, resident.

    Example: thoughtformer bench memory --out memory.jsonl
    """
    from thoughtformer.bench.memory import CASES

    run_cases(CASES, case, _options(size, repeats, contexts, threads, case), out, as_json)


@bench_app.command("flops")
def flops(
    size: SizeName = "full",
    out: Out = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """FLOPs of the paper's six (prompt, new) pairs, counted.

    Example: thoughtformer bench flops --out flops.jsonl
    """
    from thoughtformer.bench.paper import CASES

    run_cases(CASES, None, _options(size, 1, None, threads, None), out, as_json)


@bench_app.command("quality")
def quality(
    data: Data,
    case: QualityCases = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Checkpoint to score; repeatable.")] = None,
    base: Annotated[str, typer.Option(help="Plain model whose context is compressed.")] = "tiny-gpt",
    adapter: Annotated[str, typer.Option(help="Its sentinels; an empty string for none.")] = "tiny-gpt-sentinel",
    methods: Annotated[str, typer.Option(help="all, or names with commas between.", callback=check_methods)] = "all",
    removed: Annotated[str, typer.Option(help="Fractions removed, with commas between.")] = "0.3,0.5,0.7,0.9",
    num_blocks: Annotated[
        int | None, typer.Option(help="Blocks a sample; default 12, of at_bytes 32 texts a length.", min=1)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Samples of the text.")] = "0,1,2",
    lengths: Annotated[str, typer.Option(help="Of at_bytes: tokens of texts, with commas between.")] = "2048,4096,8192",
    tasks: Annotated[
        str, typer.Option(help="Of at_bytes: tasks with commas between, or none.")
    ] = "planted_fact,several_keys,read_again",
    num_texts: Annotated[int, typer.Option(help="Of at_bytes: texts of each task.", min=1)] = 20,
    setting: Annotated[
        list[str] | None, typer.Option(help="Of at_bytes: only this setting, as its table calls it; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of at_bytes: float32, bfloat16 or float16.")] = "float32",
    context_tokens: Annotated[int | None, typer.Option(help="Block; default: the trained length.", min=4)] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop at the document that reaches this.", min=1)] = None,
    column: Column = "text",
    encoding: Encoding = "utf-8",
    out: Out = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Bits per byte of checkpoints; compression at equal entries and at equal bytes, kvpress beside. Cases: bits,
    compression, recall, at_bytes. With --model any other causal LM is meant for at_bytes, which takes hours on a CPU,
    and goes on behind the lines of --out where it was interrupted.

    Example: thoughtformer bench quality --data valid.txt --out quality.jsonl
    Example: thoughtformer bench quality --model gemma-3-270m --data valid.txt --dtype bfloat16 --out gemma.jsonl
    """
    from thoughtformer.bench.at_bytes import summary
    from thoughtformer.bench.quality import CASES, QualityOptions, cases_for
    from thoughtformer.bench.records import read_records

    set_threads(threads)
    defaults = QualityOptions(data=data)
    case = case or cases_for(model)
    options = replace(
        defaults,
        models=tuple(model) if model else defaults.models,
        methods=defaults.methods if methods == "all" else tuple(methods.split(",")),
        base=base,
        adapter=adapter or None,
        removed=_numbers(removed, "removed", float),
        num_blocks=num_blocks or defaults.num_blocks,
        num_texts=num_blocks or defaults.num_texts,
        seeds=_numbers(seeds, "seeds", int),
        lengths=_numbers(lengths, "lengths", int),
        tasks=() if tasks == "none" else tuple(tasks.split(",")),
        num_task_texts=num_texts,
        settings=tuple(setting or ()),
        dtype=dtype,
        earlier=tuple(read_records([out])) if out is not None and out.exists() and "at_bytes" in case else (),
        context_tokens=context_tokens,
        max_bytes=max_bytes,
        column=column,
        encoding=encoding,
    )
    run_cases(CASES, case, options, out, as_json, {"at_bytes": lambda new: summary([*options.earlier, *new])})


@bench_app.command("peers")
def peers(
    install: Annotated[list[str] | None, typer.Option(help="Install llama-cpp or kvpress; repeatable.")] = None,
) -> None:
    """The peers that have an environment of their own: which are there, and install more.

    Example: thoughtformer bench peers --install llama-cpp --install kvpress
    """
    from thoughtformer.bench.peers import PEERS, find_peer, install_peer

    for name in install or ():
        print(f"{name}: {install_peer(name)}")
    if not install:
        for name, peer in PEERS.items():
            print(f"{name}: {find_peer(name) or 'not installed: ' + peer.note}")


def _numbers(text: str, name: str, kind: type) -> tuple[Any, ...]:
    try:
        numbers = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers:
        raise InputError(f"--{name} {text!r}: write numbers with commas between.")
    return numbers


#: Cases whose context lengths can be chosen.
WITH_CONTEXTS = ("prefill", "decode", "kv_bytes", "resident")


def _options(size: str, repeats: int, contexts: str | None, threads: int | None, cases: list[str] | None) -> Any:
    from thoughtformer.bench.running import Options
    from thoughtformer.bench.shapes import size_named

    set_threads(threads)
    chosen = None if contexts is None else _numbers(contexts, "contexts", int)
    if chosen is not None and (not cases or not set(cases) <= set(WITH_CONTEXTS)):
        raise InputError(f"--contexts is for some cases only: name them by --case, of {', '.join(WITH_CONTEXTS)}.")
    if chosen is not None and min(chosen) < 2:
        raise InputError(f"--contexts {contexts}: give lengths of 2 tokens or more.")
    return Options(size=size_named(size), repeats=repeats, contexts=chosen)


def run_cases(
    cases: dict[str, Callable[[Any], Iterator[Record]]],
    chosen: list[str] | None,
    options: Any,
    out: Path | None,
    as_json: bool,
    summaries: Mapping[str, Callable[[list[Record]], list[Record]]] = MappingProxyType({}),
) -> None:
    """Measures case by case; a line is written as soon as it is known. Of some cases a summary is shown."""
    from thoughtformer.bench.console import console_table
    from thoughtformer.bench.records import append_records, command_line, environment
    from thoughtformer.errors import nearest

    for name in chosen or ():
        if name not in cases:
            raise InputError(f"--case {name!r} is unknown.{nearest(name, cases)}")
    if out is not None:
        append_records(out, [])  # a place that can't be written to is told before hours of measuring
    where, command = environment(dtype="float32", run=datetime.now(UTC).isoformat(timespec="seconds")), command_line()
    for name in chosen or cases:
        records = []
        with Working(name) as status:
            for record in cases[name](replace(options, on_progress=status.update)):
                record = replace(record, environment=where, command=command)
                records.append(record)
                if out is not None:
                    append_records(out, [record])
                if as_json:
                    print(record.to_json(), flush=True)
        if not as_json:
            console_table(name, summaries.get(name, list)(records))

"""`thoughtformer compress eval --tasks`: what a context is kept for."""

from __future__ import annotations

import json
import sys
from typing import Any

from thoughtformer.cli.options import Working
from thoughtformer.errors import ConfigError

__all__ = ["evaluate_tasks"]


def evaluate_tasks(
    model: str,
    adapter: str | None,
    names: list[str],
    fractions: list[float],
    tasks: str,
    *,
    context_tokens: int | None,
    num_texts: int,
    seeds: list[int],
    span_tokens: int | None,
    as_json: bool,
) -> None:
    """Prints what answers are worth under each method, beside full attention's on the same texts."""
    from rich.console import Console
    from rich.table import Table

    from thoughtformer.compression import compress
    from thoughtformer.compression.registry import trained_with
    from thoughtformer.evaluate.compression import Blocks, solve
    from thoughtformer.evaluate.tasks import TASKS, make_texts, score_texts, summarise_tasks
    from thoughtformer.models.loading import load
    from thoughtformer.text.plain import document_tokenizer

    loaded, tokenizer = load(model)
    length = context_tokens if context_tokens is not None else int(loaded.config.max_position_embeddings)
    lines: list[dict[str, Any]] = []
    skipped: dict[tuple[str, float], str] = {}
    with Working("evaluating") as status:
        for task in list(TASKS) if tasks == "all" else tasks.split(","):
            texts = [
                text
                for seed in seeds
                for text in make_texts(
                    task, document_tokenizer(tokenizer), num_tokens=length, num_texts=num_texts, seed=seed
                )
            ]
            with compress(loaded, "full") as whole:
                full = score_texts(whole, texts)
            lines.append({"task": task, "method": "full", "removed": 0.0} | summarise_tasks(full, full))
            # The setting is that of the first text; the others are a sentence shorter or longer at most.
            blocks = Blocks(ids=[texts[0].ids], first_scored=len(texts[0].ids) // 2, num_bytes=1)
            for fraction in fractions:
                for name in names:
                    if name == "full" or (name, fraction) in skipped:
                        continue
                    status.update(f"evaluating: {task}, {name} at {fraction:.0%}")
                    try:
                        method = solve(
                            name,
                            fraction,
                            blocks,
                            seed=seeds[0],
                            span_tokens=span_tokens,
                            trained=trained_with(adapter),
                            tokenizer=tokenizer,
                        )
                    except ConfigError as error:
                        skipped[name, fraction] = str(error)
                        continue
                    with compress(loaded, method, adapter=adapter if method.needs_adapter else None) as compressed:
                        summary = summarise_tasks(score_texts(compressed, texts), full)
                    lines.append({"task": task, "method": name, "removed": fraction} | summary)
    for (name, fraction), why in skipped.items():
        print(f"thoughtformer: {name} at {fraction:.0%} is left out: {why}", file=sys.stderr)
    if as_json:
        values = {"model": model, "adapter": adapter, "tokens": length, "seeds": seeds, "summary": lines}
        left_out = [{"method": name, "removed": removed, "why": why} for (name, removed), why in skipped.items()]
        print(json.dumps(values | {"skipped": left_out}))
        return
    table = Table(title=f"answers at the end of {length} tokens, {len(seeds) * num_texts} texts a task")
    for heading in ("task", "method", "removed", "right", "of full's", "nats above full"):
        table.add_column(heading, justify="left" if heading in ("task", "method") else "right")
    for line in lines:
        table.add_row(
            line["task"],
            line["method"],
            f"{line['removed']:.0%}",
            f"{line['right']:.0%}",
            f"{line['right_of_full']:.0%}",
            f"{line['above_full_nats']:+.3f} \u00b1 {line['above_full_error']:.3f}",
        )
    Console().print(table)

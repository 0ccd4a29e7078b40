"""What quality is measured of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thoughtformer.bench.records import Record
from thoughtformer.compression import METHODS
from thoughtformer.errors import InputError, nearest
from thoughtformer.evaluate.tasks import TASKS
from thoughtformer.text.corpus import Corpus

__all__ = ["QualityOptions"]


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What to score, and on what.

    Attributes:
        models: checkpoints of the `bits` case.
        base, adapter: the plain model whose context is compressed, and its sentinels.
        removed: fractions of the tokens seen that methods don't hold, on average over the scored tokens.
        seeds: samples of the text.
        lengths, num_texts: of the texts of the `at_bytes` case, and how many of each.
        tasks, num_task_texts: whose answers it scores as well, and how many texts of each.
        settings: labels of its settings; none: all.
        dtype: that it computes in.
        earlier: its lines that needn't be measured again.
    """

    data: list[str]
    models: tuple[str, ...] = ("tiny-gpthf", "tiny-gpt")
    base: str = "tiny-gpt"
    adapter: str | None = "tiny-gpt-sentinel"
    methods: tuple[str, ...] = tuple(METHODS)
    removed: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    num_blocks: int = 12
    seeds: tuple[int, ...] = (0, 1, 2)
    distances: tuple[int, ...] = (8, 32, 128, 512)
    context_tokens: int | None = None
    max_bytes: int | None = None
    column: str = "text"
    encoding: str = "utf-8"
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    num_texts: int = 32
    tasks: tuple[str, ...] = ("planted_fact", "several_keys", "read_again")
    num_task_texts: int = 20
    settings: tuple[str, ...] = ()
    dtype: str = "float32"
    earlier: Sequence[Record] = ()
    on_progress: Callable[[str], None] = field(default=lambda text: None)

    def __post_init__(self) -> None:
        for fraction in self.removed:
            if not 0 < fraction < 1:
                raise InputError(f"removed={fraction}: fractions lie between 0 and 1.")
        for name in self.methods:
            if name not in METHODS:
                raise InputError(f"method {name!r} is unknown.{nearest(name, METHODS)}")
        for name in self.tasks:
            if name not in TASKS:
                raise InputError(f"task {name!r} is unknown.{nearest(name, TASKS)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"dtype {self.dtype!r}: float32, bfloat16 or float16.")

    def corpus(self) -> Corpus:
        return Corpus(sources=self.data, column=self.column, max_bytes=self.max_bytes, encoding=self.encoding)

    def sampled(self, context: int) -> dict[str, Any]:
        """The workload of the cases that draw blocks."""
        return {
            **self.workload,
            "model": self.base,
            "adapter": self.adapter,
            "context": context,
            "blocks": self.num_blocks,
            "seeds": list(self.seeds),
        }

    @property
    def workload(self) -> dict[str, Any]:
        return {"data": ["/".join(Path(source).parts[-2:]) for source in self.data], "max_bytes": self.max_bytes}

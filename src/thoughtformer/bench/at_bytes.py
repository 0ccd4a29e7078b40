"""What compression costs a model that people run: bits per byte and recall, by bytes of the whole cache.

A few texts are measured under each setting in turn, and make a line; then the next few: a run can be interrupted at any
time, and goes on behind the lines that it finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast, get_args

import numpy as np
import torch

from thoughtformer.bench.peers import PEERS, PeerProcess, find_peer
from thoughtformer.bench.peers.process import PeerError
from thoughtformer.bench.quality_options import QualityOptions
from thoughtformer.bench.records import Record, Spread
from thoughtformer.compression import METHODS, compress
from thoughtformer.compression.method import CacheBytes
from thoughtformer.compression.model import CompressedModel
from thoughtformer.errors import ConfigError, InputError, UnsupportedError, nearest
from thoughtformer.evaluate.compression import Blocks, mean_cache_bytes, sample_blocks, summed_loss
from thoughtformer.evaluate.tasks import TaskText, make_texts, score_texts
from thoughtformer.models.backbone import Backbone, backbone_of
from thoughtformer.models.loading import load
from thoughtformer.text.plain import document_tokenizer

__all__ = ["at_bytes", "settings_at", "summary"]

#: Texts that make a line.
TOGETHER = 4
#: Of texts above 4,096 tokens, for methods that decide token by token: they take minutes each.
FEW_TEXTS = 8
#: That hold an answer's question, for presses.
QUESTION_TOKENS = 32
#: What is measured on the text itself; all else are tasks.
TEXT = "text"
#: kvpress's presses, and the fractions that they drop of a prompt.
PRESSES: dict[str | None, tuple[float, ...]] = {
    None: (0.0,),
    "StreamingLLMPress": (0.5, 0.75),
    "KnormPress": (0.5,),
    "SnapKVPress": (0.5, 0.75),
    "ExpectedAttentionPress": (0.5, 0.75),
    "TOVAPress": (0.5, 0.75),
    "KVzipPress": (0.5, 0.75),
}


def settings_at(num_tokens: int) -> dict[str, dict[str, Any]]:
    """Methods with their settings, by label, for texts of a length; full attention first."""

    def entries(fraction: float) -> int:
        return max(round(fraction * num_tokens / 64) * 64, 64)

    def made(name: str, **settings: Any) -> dict[str, Any]:
        return {"method": name, **settings}

    least = {"recent_tokens": 0}  # raw; what waits to be a block is, too
    zipped = {"bits": 4, "recent_tokens": 16, "block_tokens": 32}
    looked_up = {"recent_tokens": 0, "in_host_memory": True}
    found = {
        "full": made("full"),
        "8 bits": made("quantised", bits=8, **least),
        "4 bits": made("quantised", bits=4, **least),
        "4 bits, 64 raw": made("quantised", bits=4),
        "2 bits": made("quantised", bits=2, **least),
        "4 bits, half dropped": made("quantised", bits=4, held_tokens=entries(0.5), **least),
    }
    for fraction, name in ((0.5, "1/2"), (0.25, "1/4"), (0.125, "1/8")):
        every = max(entries(fraction) // 4, 64)
        found |= {
            f"streaming {name}": made("streaming", max_entries=entries(fraction)),
            f"snapkv {name}": made("snapkv", max_entries=entries(fraction), every_tokens=every),
            f"expected_attention {name}": made("expected_attention", max_entries=entries(fraction), every_tokens=every),
            f"kvzip {name}": made("kvzip", removed=1 - fraction),
            f"kvzip {name}, 4 bits": made("kvzip", removed=1 - fraction, **zipped),
        }
    quarter = entries(0.25)
    return found | {
        "h2o 1/4": made("h2o", max_entries=quarter),
        "tova 1/4": made("tova", max_entries=quarter),
        "random 1/4": made("random", max_entries=quarter),
        "scattered 1/4": made("scattered", removed=0.75),
        "local 1/4": made("local", removed=0.75),
        "truncation 1/4": made("truncation", piece_tokens=2 * quarter),
        "combiner 1/4": made("combiner", removed=0.75),
        "attention_matching 1/2": made("attention_matching", removed=0.5),
        "attention_matching 1/4": made("attention_matching", removed=0.75),
        "sepllm": made("sepllm", recent_tokens=quarter),
        "selection 1/4": made("selection", read_tokens=quarter),
        "selection 1/8": made("selection", read_tokens=entries(0.125)),
        "lookup 1/8, the rest in host memory": made("lookup", read_tokens=entries(0.125), **looked_up),
        "lookup 1/12, the rest in host memory": made("lookup", read_tokens=entries(1 / 12), **looked_up),
    }


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """Some of a length's texts of one kind."""

    kind: str
    first: int
    blocks: tuple[Blocks, ...] = ()
    texts: tuple[TaskText, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks) or len(self.texts)


def full_bytes(backbone: Backbone, blocks: Blocks) -> float:
    """Keys and values of two bytes a number, as each scored token finds them under full attention; on average.

    Layers with a window hold what is in it.
    """
    entry = 4 * backbone.num_kv_heads * backbone.head_dim
    before = np.arange(len(blocks.ids[0]))[blocks.first_scored :]
    held = sum(
        len(group.layers) * (before if group.window is None else before.clip(max=group.window - 1)).mean()
        for group in backbone.groups
    )
    return float(held) * entry


def _parts(options: QualityOptions, tokenizer: Any, num_tokens: int) -> list[_Texts]:
    """All texts of a length, in the order in which they are measured: some of each kind, then the next."""
    samples = sample_blocks(
        options.corpus(), tokenizer, context_tokens=num_tokens, num_blocks=1, seeds=range(options.num_texts)
    )
    blocks = list(samples.values())
    parts = [
        _Texts(kind=TEXT, first=first, blocks=tuple(blocks[first : first + TOGETHER]))
        for first in range(0, len(blocks), TOGETHER)
    ]
    for task in options.tasks:
        texts = make_texts(task, tokenizer, num_tokens=num_tokens, num_texts=options.num_task_texts)
        parts += [
            _Texts(kind=task, first=first, texts=tuple(texts[first : first + TOGETHER]))
            for first in range(0, len(texts), TOGETHER)
        ]
    return sorted(parts, key=lambda part: part.first)


def at_bytes(options: QualityOptions) -> Iterator[Record]:
    """Every setting on every text that isn't in `options.earlier`; kvpress's presses beside."""
    if len(options.models) != 1:
        raise InputError(f"the case at_bytes takes one --model, not {len(options.models)}.")
    (name,) = options.models
    labels = [*settings_at(max(options.lengths)), *(_press_label(*pair) for pair in _presses())]
    for label in options.settings:
        if label not in labels:
            raise InputError(f"setting {label!r} is unknown.{nearest(label, labels)}")
    model, tokenizer = load(name, dtype=getattr(torch, options.dtype))
    tokenizer = document_tokenizer(tokenizer)
    backbone = backbone_of(model)
    parts = {length: _parts(options, tokenizer, length) for length in options.lengths}
    firsts = sorted({part.first for of in parts.values() for part in of})
    known = {record.name for record in options.earlier}
    with ExitStack() as stack:
        peer: PeerProcess | None = None
        if not options.settings or any(label.startswith("kvpress") for label in options.settings):
            peer, why = _started_press(name, options.dtype)
            if peer is not None:
                stack.enter_context(peer)
            else:
                told = {"theme": "quality", "case": "at_bytes", "peer": "kvpress", "workload": {"model": _short(name)}}
                yield from (line for line in [Record(**told, skipped=why)] if line.name not in known)
        for first, length in product(firsts, parts):
            here = [part for part in parts[length] if part.first == first]
            for measure in _measures(options, backbone, length, first):
                missing = [part for part in here if measure.place(part).name not in known]
                if not missing:
                    continue
                options.on_progress(f"{length} tokens, text {first + 1}: {measure.label}")
                if "method" in measure.settings:
                    yield from measure.under(model, tokenizer, missing)
                elif peer is not None:
                    yield from measure.pressed(peer, missing)


def _measures(options: QualityOptions, backbone: Backbone, length: int, first: int) -> Iterator[_Measure]:
    """What is to be measured on texts of a length from the `first` one on."""
    presses = {_press_label(press, ratio): {"press": press, "ratio": ratio} for press, ratio in _presses()}
    for label, settings in (settings_at(length) | presses).items():
        if "method" in settings and label != "full":
            kind = METHODS[settings["method"]]
            is_long = length > 4096 and kind.decides_each_token and first >= FEW_TEXTS
            if kind.name not in options.methods or is_long:
                continue
        if label == "full" or label in (options.settings or [label]):
            yield _Measure(options, backbone, length, label, settings)


def _started_press(name: str, dtype: str) -> tuple[PeerProcess | None, str]:
    """kvpress with the model loaded, or why there is none."""
    python = find_peer("kvpress")
    if python is None:
        return None, "not installed here: thoughtformer bench peers --install kvpress"
    peer = PeerProcess(python, PEERS["kvpress"].worker, threads=torch.get_num_threads())
    try:
        peer.about = peer.ask(ask="load", path=name, threads=torch.get_num_threads(), dtype=dtype)
    except PeerError as error:
        peer.close()
        return None, f"it can't load the model: {error}"
    return peer, ""


def _presses() -> list[tuple[str | None, float]]:
    return [(press, fraction) for press, fractions in PRESSES.items() for fraction in fractions]


def _press_label(press: str | None, fraction: float) -> str:
    return f"kvpress {(press or 'none').removesuffix('Press')} {1 - fraction:g}"


def _short(name: str) -> str:
    """A model's name without its folder's place."""
    return name.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class _Measure:
    """One setting at one length."""

    options: QualityOptions
    backbone: Backbone
    length: int
    label: str
    settings: dict[str, Any]

    def place(self, part: _Texts) -> Record:
        """The line of some texts, without figures."""
        options = self.options
        workload = {
            "model": _short(options.models[0]),
            "dtype": options.dtype,
            "tokens": self.length,
            "texts": part.kind,
            "first": part.first,
            "number": len(part),
        }
        if part.kind == TEXT:
            workload |= options.workload
        return Record(theme="quality", case="at_bytes", peer=self.label, workload=workload, settings=self.settings)

    def line(self, part: _Texts, metrics: dict[str, list[float]], **more: Any) -> Record:
        place = self.place(part)
        shown = {name: Spread.of(values, keep=True) for name, values in metrics.items()}
        return Record(**{**vars(place), "metrics": shown, **more})

    def under(self, model: Any, tokenizer: Any, parts: Sequence[_Texts]) -> Iterator[Record]:
        """What a method of this package makes of texts."""
        try:
            compressed = compress(model, **self.settings, tokenizer=tokenizer)
        except (ConfigError, UnsupportedError) as error:
            yield from (self.line(part, {}, skipped=str(error)) for part in parts)
            return
        with compressed:
            for part in parts:
                yield self.line(part, self._bits(compressed, part) if part.blocks else _answers(compressed, part))

    def _bits(self, compressed: CompressedModel, part: _Texts) -> dict[str, list[float]]:
        dtype = compressed.backbone.dtype
        half = dtype if dtype.itemsize == 2 else torch.float16
        metrics: dict[str, list[float]] = {
            "bits_per_byte": [
                summed_loss(compressed, blocks) / math.log(2) / blocks.num_bytes for blocks in part.blocks
            ]
        }
        for kind in get_args(CacheBytes):
            metrics[f"{kind}_of_full"] = [
                mean_cache_bytes(compressed, blocks, dtype=half, kind=cast("CacheBytes", kind))
                / full_bytes(compressed.backbone, blocks)
                for blocks in (part.blocks if compressed.method.reads_ids else part.blocks[:1] * len(part))
            ]
        return metrics

    def pressed(self, peer: PeerProcess, parts: Sequence[_Texts]) -> Iterator[Record]:
        """What a press makes of them: it prunes what was read before the scored tokens, once."""
        for part in parts:
            texts = [(blocks.ids[0], blocks.first_scored) for blocks in part.blocks]
            texts += [(text.ids, len(text.ids) - text.num_answer) for text in part.texts]
            # A question comes behind what was pruned, as it does for methods that drop while they read.
            behind = 0 if part.blocks else QUESTION_TOKENS
            answers = [
                peer.ask(ask="score", blocks=[ids], first_scored=first, read_later=behind, **self.settings)
                for ids, first in texts
            ]
            errors = [answer["error"] for answer in answers if "error" in answer]
            if errors:
                yield self.line(part, {}, skipped=str(errors[0]))
                continue
            nats = [answer["loss_nats"] for answer in answers]
            if part.texts:
                lengths = [text.num_answer for text in part.texts]
                metrics = {
                    "right": [float(answer["is_right"]) for answer in answers],
                    "loss_nats": [total / number for total, number in zip(nats, lengths, strict=True)],
                }
            else:
                held = [
                    answer["mean_numbers"] * 2 / full_bytes(self.backbone, blocks)
                    for answer, blocks in zip(answers, part.blocks, strict=True)
                ]
                metrics = {
                    "bits_per_byte": [
                        total / math.log(2) / blocks.num_bytes for total, blocks in zip(nats, part.blocks, strict=True)
                    ],
                    **{f"{kind}_of_full": held for kind in get_args(CacheBytes)},
                }
            yield self.line(part, metrics, settings=self.settings)


def _answers(compressed: CompressedModel, part: _Texts) -> dict[str, list[float]]:
    scores = score_texts(compressed, part.texts)
    return {
        "right": [float(score.is_right) for score in scores],
        "loss_nats": [score.loss_nats for score in scores],
    }


def summary(records: Iterable[Record]) -> list[Record]:
    """A record for each setting and length: means over all its texts, beside full attention's on the same texts.

    Ranges are one standard error on either side; the environment is that of the last line. `TASK_of_full` is the
    fraction right of those answers that full attention gets right, and `above_full_bits_per_byte` the mean of
    differences text by text.
    """
    groups: dict[tuple[Any, ...], dict[tuple[str, int], Record]] = {}
    last: dict[str, Record] = {}
    for record in records:
        work = record.workload
        if record.case != "at_bytes" or "tokens" not in work:
            continue
        of = groups.setdefault((work["model"], work["dtype"], work["tokens"], record.peer), {})
        if of and next(iter(of.values())).settings != record.settings:
            of.clear()  # a setting that changed is measured anew
        of[work["texts"], work["first"]] = last[work["model"]] = record
    found = []
    for key, of in groups.items():
        full = groups.get((*key[:-1], "full"), {})
        shared = {name: (line, full[name]) for name, line in of.items() if name in full}
        metrics: dict[str, Spread] = {}
        for texts in dict.fromkeys(texts for texts, _ in shared):
            pairs = [pair for (kind, _), pair in shared.items() if kind == texts and pair[0].metrics]
            if pairs:
                metrics |= _of_text(pairs) if texts == TEXT else _of_answers(texts, pairs)
        mine = list(of.values())[-1]
        found.append(
            replace(
                mine,
                workload={name: mine.workload[name] for name in ("model", "dtype", "tokens")},
                metrics=metrics,
                skipped=None if metrics else mine.skipped or "full attention isn't measured yet",
                environment=last[mine.workload["model"]].environment,
            )
        )
    return sorted(found, key=lambda record: record.workload["tokens"])


def _values(pairs: Sequence[tuple[Record, Record]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each text, under a setting and under full attention."""
    ours, full = (
        [value for record in side for value in record.metrics[name].values] for side in zip(*pairs, strict=True)
    )
    return np.array(ours), np.array(full)


def _of_text(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Spread]:
    ours, full = _values(pairs, "bits_per_byte")
    bytes_of_full = {f"{kind}_of_full": _mean(_values(pairs, f"{kind}_of_full")[0]) for kind in get_args(CacheBytes)}
    return {"above_full_bits_per_byte": _mean(ours - full), **bytes_of_full}


def _of_answers(task: str, pairs: Sequence[tuple[Record, Record]]) -> dict[str, Spread]:
    ours, full = _values(pairs, "right")
    return {f"{task}_of_full": _mean(ours[full == 1])} if full.any() else {}


def _mean(values: np.ndarray) -> Spread:
    middle = float(values.mean())
    error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Spread(median=middle, low=middle - error, high=middle + error, runs=len(values))

"""Quality: bits per byte of checkpoints, and what compression costs by bytes held, kvpress beside."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from thoughtformer.bench.at_bytes import at_bytes
from thoughtformer.bench.peers import PEERS, PeerProcess, find_peer
from thoughtformer.bench.quality_options import QualityOptions
from thoughtformer.bench.records import Record, Spread
from thoughtformer.compression import METHODS, compress
from thoughtformer.compression.registry import trained_with
from thoughtformer.convert.llama import export_llama
from thoughtformer.errors import ConfigError
from thoughtformer.evaluate import BitsReport, score_documents, window_sizes
from thoughtformer.evaluate.compression import Blocks, MethodScore, sample_blocks, score_method, solve
from thoughtformer.evaluate.planted_facts import plant_facts, score_recall
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.backbone import backbone_of
from thoughtformer.models.loading import is_gpthf, load, load_gpthf
from thoughtformer.text.plain import document_tokenizer

__all__ = ["CASES", "PRESSES", "QualityOptions", "cases_for"]

#: kvpress's presses to run beside, by the names used here.
PRESSES = {
    "kvpress streaming_llm": "StreamingLLMPress",
    "kvpress knorm": "KnormPress",
    "kvpress snapkv": "SnapKVPress",
    "kvpress expected_attention": "ExpectedAttentionPress",
    "kvpress tova": "TOVAPress",
}


def bits(options: QualityOptions) -> Iterator[Record]:
    """Bits per byte of the original text, all bits counted."""
    for name in options.models:
        options.on_progress(f"bits per byte: {name}")
        model, tokenizer = load_gpthf(name)
        context, stride = window_sizes(model, options.context_tokens, None)
        report = BitsReport.from_scores(
            score_documents(model, tokenizer, options.corpus(), context_tokens=context, stride_tokens=stride),
            context_tokens=context,
            stride_tokens=stride,
        )
        yield Record(
            theme="quality",
            case="bits",
            peer=name,
            workload={**options.workload, "context": context, "bytes": report.num_bytes},
            metrics={"bits_per_byte": Spread.of([report.bits_per_byte])},
            settings={"parameters": sum(parameter.numel() for parameter in model.parameters())},
        )


def _base(options: QualityOptions) -> tuple[Any, Any, int]:
    model, tokenizer = load(options.base)
    return model, document_tokenizer(tokenizer), options.context_tokens or int(model.config.max_position_embeddings)


def _names(options: QualityOptions) -> list[str]:
    return [name for name in options.methods if options.adapter is not None or not METHODS[name].needs_adapter]


def compression(options: QualityOptions) -> Iterator[Record]:
    """Bits per byte against bytes held: every method at equal entries, kvpress's presses at the same fractions.

    A press prunes the prompt once, when it has been read; what is written after stays. The methods here drop and fold
    as they go. So bytes are compared as they were while the scored tokens were read, not fractions. `above_full` tells
    what each sample costs more than with full attention.
    """
    model, tokenizer, context = _base(options)
    samples = sample_blocks(
        options.corpus(), tokenizer, context_tokens=context, num_blocks=options.num_blocks, seeds=list(options.seeds)
    )
    workload = options.sampled(context)
    full = [_score(options, model, tokenizer, "full", 0.0, blocks, seed) for seed, blocks in samples.items()]
    yield _compression_record("full", {**workload, "removed": 0.0}, full, full)
    for removed in options.removed:
        for name in _names(options):
            if name == "full":
                continue
            options.on_progress(f"{name} at {removed:.0%} removed")
            place = {**workload, "removed": removed}
            try:
                scores = [
                    _score(options, model, tokenizer, name, removed, blocks, seed) for seed, blocks in samples.items()
                ]
            except ConfigError as error:
                yield Record(theme="quality", case="compression", peer=name, workload=place, skipped=str(error))
                continue
            yield _compression_record(name, place, scores, full)
    yield from _kvpress(options, model, samples, workload)


def _score(
    options: QualityOptions, model: Any, tokenizer: Any, name: str, removed: float, blocks: Blocks, seed: int
) -> MethodScore:
    method = solve(name, removed, blocks, seed=seed, trained=trained_with(options.adapter), tokenizer=tokenizer)
    with compress(model, method, adapter=options.adapter if method.needs_adapter else None) as compressed:
        return score_method(compressed, blocks, removed=removed, seed=seed)


def _compression_record(
    name: str, workload: dict[str, Any], scores: Sequence[MethodScore], full: Sequence[MethodScore]
) -> Record:
    pairs = zip(scores, full, strict=True)
    metrics = {
        "bits_per_byte": [score.bits_per_byte for score in scores],
        "above_full_bits_per_byte": [score.bits_per_byte - other.bits_per_byte for score, other in pairs],
        "kv_bytes": [score.mean_kv_bytes for score in scores],
        "entries": [score.mean_entries for score in scores],
    }
    return Record(
        theme="quality",
        case="compression",
        peer=name,
        workload=workload,
        metrics={metric: Spread.of(values) for metric, values in metrics.items()},
        settings=scores[0].settings,
    )


def _kvpress(
    options: QualityOptions, model: Any, samples: dict[int, Blocks], workload: dict[str, Any]
) -> Iterator[Record]:
    python = find_peer("kvpress")
    if python is None:
        why = "not installed here: thoughtformer bench peers --install kvpress"
        yield Record(theme="quality", case="compression", peer="kvpress", workload=workload, skipped=why)
        return
    if not isinstance(model, GPTHFForCausalLM):
        yield Record(
            theme="quality", case="compression", peer="kvpress", workload=workload, skipped="needs an own plain GPT"
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        export_llama(*load_gpthf(options.base), Path(folder) / "llama")
        with PeerProcess(python, PEERS["kvpress"].worker, threads=torch.get_num_threads()) as peer:
            version = peer.ask(ask="load", path=str(Path(folder) / "llama"), threads=torch.get_num_threads())
            backbone = backbone_of(model)
            entry_bytes = backbone.kv_shape(range(backbone.num_layers)).entry_bytes
            unpruned: list[float] = []
            for name, press in {"kvpress none": None, **PRESSES}.items():
                for ratio in options.removed if press is not None else (0.0,):
                    options.on_progress(f"{name} at {ratio:.0%}")
                    answers = [
                        peer.ask(ask="score", press=press, ratio=ratio, blocks=part.ids, first_scored=part.first_scored)
                        for part in samples.values()
                    ]
                    place = {**workload, "removed": ratio}
                    errors = [answer["error"] for answer in answers if "error" in answer]
                    if press is not None and not unpruned:
                        errors = ["it couldn't score the text without a press"]
                    if errors:
                        yield Record(
                            theme="quality", case="compression", peer=name, workload=place, skipped=str(errors[0])
                        )
                        continue
                    bits = [
                        answer["loss_nats"] / math.log(2) / part.num_bytes
                        for answer, part in zip(answers, samples.values(), strict=True)
                    ]
                    unpruned = unpruned or bits
                    yield Record(
                        theme="quality",
                        case="compression",
                        peer=name,
                        workload=place,
                        metrics=_press_metrics(bits, unpruned, answers, entry_bytes),
                        settings={"press": press, **version},
                    )


def _press_metrics(
    bits: Sequence[float], unpruned: Sequence[float], answers: Sequence[dict[str, float]], entry_bytes: int
) -> dict[str, Spread]:
    entries = [answer["mean_entries"] for answer in answers]
    return {
        "bits_per_byte": Spread.of(bits),
        "above_full_bits_per_byte": Spread.of([ours - full for ours, full in zip(bits, unpruned, strict=True)]),
        "kv_bytes": Spread.of([count * entry_bytes for count in entries]),
        "entries": Spread.of(entries),
    }


def recall(options: QualityOptions) -> Iterator[Record]:
    """What a compressed context still knows: nats gained on each token of a planted fact, by distance."""
    model, tokenizer, context = _base(options)
    blocks = sample_blocks(
        options.corpus(), tokenizer, context_tokens=context, num_blocks=options.num_blocks, seeds=[options.seeds[0]]
    )[options.seeds[0]]
    start = getattr(tokenizer, "bos_token_id", None)
    fillers = [[token for token in ids if token != start] for ids in blocks.ids]
    distances = [distance for distance in options.distances if distance < context // 2]
    texts = plant_facts(fillers, tokenizer, distances=distances, context_tokens=context - 1)
    workload = options.sampled(context)
    for removed in (0.0, *options.removed):
        for name in _names(options):
            if (name == "full") != (removed == 0):
                continue
            options.on_progress(f"recall: {name} at {removed:.0%} removed")
            try:
                method = solve(
                    name,
                    removed,
                    blocks,
                    seed=options.seeds[0],
                    trained=trained_with(options.adapter),
                    tokenizer=tokenizer,
                )
            except ConfigError as error:
                place = {**workload, "removed": removed}
                yield Record(theme="quality", case="recall", peer=name, workload=place, skipped=str(error))
                continue
            with compress(model, method, adapter=options.adapter if method.needs_adapter else None) as compressed:
                scores = score_recall(compressed, texts, removed=removed)
            for score in scores:
                error = score.standard_error
                yield Record(
                    theme="quality",
                    case="recall",
                    peer=name,
                    workload={**workload, "removed": removed, "distance": score.distance},
                    # One standard error of the mean over texts on either side.
                    metrics={
                        "gained_nats": Spread(
                            median=score.gained_nats,
                            low=score.gained_nats - error,
                            high=score.gained_nats + error,
                            runs=score.num_texts,
                        )
                    },
                )


#: What `bench quality` measures, by name.
CASES: dict[str, Callable[[QualityOptions], Iterator[Record]]] = {
    "bits": bits,
    "compression": compression,
    "recall": recall,
    "at_bytes": at_bytes,
}


def cases_for(models: Sequence[str] | None) -> list[str]:
    """Those that are measured if none is named: of models of this package, or of no model named, all but `at_bytes`."""
    others = [name for name in models or () if not is_gpthf(name)]
    return ["at_bytes"] if others else [name for name in CASES if name != "at_bytes"]

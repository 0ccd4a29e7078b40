"""What a compressed context still knows: log-likelihood gained on a planted fact, by fraction removed and distance.

    python benchmarks/compression_recall.py --data valid.txt

Prints a table, then one JSON line. Methods hold equally many entries on average, as in `compress eval`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch
import transformers
from rich.console import Console
from rich.table import Table

from thoughtformer.compression import compress
from thoughtformer.compression.adapter import read_adapter_manifest
from thoughtformer.evaluate.compression import equal_methods, sample_blocks
from thoughtformer.evaluate.recall import plant_facts, score_recall
from thoughtformer.models.loading import load_causal_lm, resolve
from thoughtformer.text.corpus import Corpus
from thoughtformer.text.plain import document_tokenizer


def main() -> None:
    """Scores every method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--model", default="tiny-gpt")
    parser.add_argument("--adapter", default="tiny-gpt-sentinel")
    parser.add_argument("--methods", default="full,local,streaming,h2o,combiner,sentinel")
    parser.add_argument("--removed", default="0.5,0.9")
    parser.add_argument("--distances", default="8,32,128,512")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--max-bytes", type=int, default=2_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    model, tokenizer = load_causal_lm(arguments.model)
    encoder = document_tokenizer(tokenizer)
    context = int(model.config.max_position_embeddings)
    corpus = Corpus(sources=arguments.data, max_bytes=arguments.max_bytes)
    blocks = sample_blocks(corpus, encoder, context_tokens=context, num_blocks=arguments.texts, seeds=[0])[0]
    start = getattr(tokenizer, "bos_token_id", None)
    fillers = [[token for token in ids if token != start] for ids in blocks.ids]
    distances = [int(part) for part in arguments.distances.split(",")]
    texts = plant_facts(fillers, encoder, distances=distances, context_tokens=context - 1)
    manifest = read_adapter_manifest(resolve(arguments.adapter))
    sentinels = {name: manifest[name] for name in ("num_sentinels", "see_earlier")}
    scores = []
    for removed in [0.0, *(float(part) for part in arguments.removed.split(","))]:
        names = arguments.methods.split(",")
        names = [name for name in names if (name == "full") == (removed == 0)]
        for name, method in equal_methods(names, removed, blocks, seed=0, **sentinels).items():
            adapter = arguments.adapter if name == "sentinel" else None
            with compress(model, method, adapter=adapter) as compressed:
                scores += score_recall(compressed, texts, removed=removed)
    table = Table(title=f"nats gained per token of a planted fact, {arguments.texts} texts of {context - 1} tokens")
    for heading in ("method", "removed", *(f"{distance} back" for distance in distances)):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for position in range(0, len(scores), len(distances)):
        group = scores[position : position + len(distances)]
        cells = [f"{score.gained_nats:.2f} ± {score.standard_error:.2f}" for score in group]
        table.add_row(group[0].method, f"{group[0].removed:.0%}", *cells)
    Console().print(table)
    print(json.dumps({"arguments": vars(arguments), "scores": [asdict(score) for score in scores]}))


if __name__ == "__main__":
    main()

"""FLOPs of the paper's six (prompt, new) pairs (arXiv 2503.11426), for GPTHF and for GPTs with and without cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from thoughtformer.bench.flops import generation_flops, regular_ids
from thoughtformer.bench.records import Record, Spread
from thoughtformer.bench.running import Options
from thoughtformer.bench.shapes import SENTENCE_TOKENS
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
from thoughtformer.models.packed_linear import pack_weights, using_packed_weights

__all__ = ["CASES", "PAIRS", "exact_incremental_flops"]

#: (prompt, new) tokens of one request.
PAIRS = ((100, 100), (100, 250), (250, 100), (250, 250), (20, 500), (500, 20))


def exact_incremental_flops(config: GPTHFConfig, prompt: int, new: int, sentence_tokens: int = SENTENCE_TOKENS) -> int:
    """What a `fast` GPTHF has to compute at least, in closed form, for a text of equal sentences.

    Encoder and body read every new token; of the prompt's closed sentences the body reads one position each.
    """
    assert config.intermediate_size is not None
    hidden = config.hidden_size
    linear = 2 * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    attention = 4 * hidden  # scores and values, for one query and key
    total = 0
    for position in range(prompt + new - 1):
        in_sentence = position % sentence_tokens
        total += config.num_encoder_layers * (linear + attention * (in_sentence + 1))
        is_end = in_sentence == sentence_tokens - 1
        if position >= prompt or is_end or position == prompt - 1:
            total += config.num_body_layers * (linear + attention * (position // sentence_tokens + 1))
    return total + new * 2 * hidden * config.vocab_size


def recomputing_flops(config: GPTHFConfig, prompt: int, new: int) -> int:
    """What a plain GPT computes that reads the whole text anew for every token, its attention as a full square."""
    assert config.intermediate_size is not None
    hidden, total = config.hidden_size, 0
    linear = 2 * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    for length in range(prompt, prompt + new):
        total += config.num_hidden_layers * (linear * length + 4 * hidden * length**2) + 2 * hidden * config.vocab_size
    return total


def pairs(options: Options) -> Iterator[Record]:
    """Counted FLOPs of both models, 16+8 and 24 layers, d 1024, FF 4096, 50,260 ids."""
    is_full = options.size.name == "full"
    config = GPTHFConfig(
        vocab_size=50260 if is_full else 300,
        hidden_size=1024 if is_full else 64,
        intermediate_size=4096 if is_full else 256,
        num_encoder_layers=16 if is_full else 2,
        num_body_layers=8 if is_full else 1,
        num_attention_heads=16 if is_full else 2,
        body_visibility="fast",
    )
    torch.manual_seed(0)
    gpthf = GPTHFForCausalLM(config).eval()
    layers = config.num_hidden_layers
    plain = GPTHFConfig(
        **{**config.to_diff_dict(), "num_encoder_layers": 0, "num_body_layers": layers, "body_visibility": "causal"}
    )
    gpt = GPTHFForCausalLM(plain).eval()
    name = f"gpthf {config.num_encoder_layers}+{config.num_body_layers} fast"
    for model in (gpthf, gpt):
        pack_weights(model)
    for prompt, new in PAIRS if is_full else PAIRS[-1:]:
        workload = {"prompt": prompt, "new": new, "layers": layers, "size": options.size.name}
        ids = regular_ids(prompt + new, sentence_tokens=SENTENCE_TOKENS, sentence_end_token_id=1)
        expected = exact_incremental_flops(config, prompt, new)
        for peer, model in ((name, gpthf), ("gpt", gpt)):
            options.on_progress(f"FLOPs of {prompt} + {new} tokens: {peer}")
            with using_packed_weights():
                counted = generation_flops(model, ids[:prompt], ids[prompt:])
            metrics = {"flops": Spread.of([float(counted)])}
            if model is gpthf:
                metrics["exact_incremental_flops"] = Spread.of([float(expected)])
            yield Record(theme="flops", case="pairs", peer=peer, workload=workload, metrics=metrics)
        yield Record(
            theme="flops",
            case="pairs",
            peer="gpt without cache",
            workload=workload,
            metrics={"flops": Spread.of([float(recomputing_flops(plain, prompt, new))])},
            settings={"counted": "by formula"},
        )


#: What `bench flops` measures, by name.
CASES: dict[str, Callable[[Options], Iterator[Record]]] = {"pairs": pairs}

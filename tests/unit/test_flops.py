"""The counter on products known by hand, and on the paper's pairs at a size that runs in a test."""

from __future__ import annotations

import pytest
import torch

from thoughtformer.bench import count_flops, generation_flops, regular_ids
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM


def test_products_known_by_hand():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with count_flops() as matrix:
        torch.randn(4, 6) @ torch.randn(6, 10)
    with count_flops() as attention:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert matrix.total == 2 * 4 * 6 * 10
    assert attention.total == 2 * (2 * 2 * 3 * 5 * 7 * 8)  # scores, then values: torch alone counts 0 on a CPU


def linear_flops(config: GPTHFConfig, prompt: int, new: int, sentence: int) -> int:
    """Linear layers and head of the exact incremental method."""
    layer = 2 * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    open_tokens = prompt % sentence
    body_tokens = {"fast": prompt // sentence + (open_tokens > 0), "causal": prompt}[config.body_visibility]
    prefill = prompt * config.num_encoder_layers + body_tokens * config.num_body_layers
    steps = (new - 1) * config.num_hidden_layers
    return layer * (prefill + steps) + new * 2 * config.hidden_size * config.vocab_size


def causal_attention_flops(config: GPTHFConfig, prompt: int, new: int) -> int:
    """Scores and values: the prompt's square at once, then one query over all that is held."""
    pairs = prompt**2 + sum(range(prompt + 1, prompt + new))
    return config.num_hidden_layers * 4 * config.hidden_size * pairs


@pytest.mark.parametrize("visibility", ["fast", "causal"])
@pytest.mark.parametrize(("prompt", "new"), [(100, 10), (20, 50), (230, 2)])
def test_generation_costs_what_the_method_says(visibility, prompt, new):
    """To the FLOP for a plain GPT; for GPTHF up to its attention, which is little in a wide, shallow model."""
    config = GPTHFConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=512,
        num_encoder_layers=2 if visibility == "fast" else 0,
        num_body_layers=1 if visibility == "fast" else 3,
        body_visibility=visibility,
        sentence_end_token_id=1,
    )
    ids = regular_ids(prompt + new, sentence_tokens=25, sentence_end_token_id=1)
    counted = generation_flops(GPTHFForCausalLM(config).eval(), ids[:prompt], ids[prompt:])
    linear = linear_flops(config, prompt, new, 25)
    if visibility == "causal":
        assert counted == linear + causal_attention_flops(config, prompt, new)
    else:
        assert linear < counted < 1.05 * linear


def test_regular_ids():
    assert regular_ids(7, sentence_tokens=3, sentence_end_token_id=1) == [3, 3, 1, 3, 3, 1, 3]
    assert regular_ids(3, sentence_tokens=3, sentence_end_token_id=None) == [3, 3, 3]

"""The benchmark harness: synthetic caches are those of real texts, lines survive a round trip, figures are what ran."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from thoughtformer.bench.flops import regular_ids
from thoughtformer.bench.synthetic import filled_cache, filled_dynamic_cache


@pytest.mark.parametrize("context", [7, 25, 60, 76])
def test_a_filled_cache_is_that_of_a_text_read(visibility, context):
    """The same lengths, counters and entries, and so the same bytes and the same masks."""
    model = tiny_model(visibility)
    filled = filled_cache(model, num_rows=2, context=context)
    read = model.new_cache(2)
    read.reserve(context)
    ids = torch.tensor([regular_ids(context, sentence_tokens=25, sentence_end_token_id=1)] * 2)
    with torch.no_grad():
        model(ids, past_key_values=read)
    assert filled.num_bytes() == read.num_bytes()
    assert filled.get_seq_length() == read.get_seq_length() == context
    for name in ("document", "sentence", "offset", "position"):
        assert torch.equal(getattr(filled.counters, name), getattr(read.counters, name))
    for ours, theirs in zip(filled.stages, read.stages, strict=True):
        assert torch.equal(ours.lengths, theirs.lengths)
        assert torch.equal(ours.entries[:, :, : ours.longest], theirs.entries[:, :, : theirs.longest])


def test_a_filled_dynamic_cache_holds_the_context():
    model = tiny_model("causal", num_encoder_layers=0)
    cache = filled_dynamic_cache(model, num_rows=3, context=11)
    assert cache.get_seq_length() == 11
    assert len(cache.layers) == model.config.num_body_layers

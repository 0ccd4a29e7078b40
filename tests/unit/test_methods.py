"""Settings of compression methods that can't be, what they cost in half precision, and numbers in fewer bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twins
from lms import TINY_METHODS, random_ids, step_by_step, tiny_lm
from thoughtformer.cache.blocks import allotted_blocks
from thoughtformer.cache.quantised import BITS, dequantised, quantised, sizes
from thoughtformer.cache.shape import KVShape
from thoughtformer.compression import (
    TOVA,
    AttentionMatching,
    ExpectedAttention,
    KVzip,
    Quantised,
    Selection,
    SepLLM,
    SnapKV,
    compress,
)
from thoughtformer.errors import ConfigError, UnsupportedError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TOVA(max_entries=1), "max_entries=1 must be a whole number of at least 2"),
        (lambda: SnapKV(pooled_entries=4), "pooled_entries=4 has no middle"),
        (lambda: SnapKV(every_tokens=8), "observed_tokens=32 is more than every_tokens=8"),
        (lambda: SnapKV(max_entries=32), r"budget of 32 entries .* leaves nothing beside observed_tokens=32"),
        (lambda: SnapKV(pyramid=0.5), r"pyramid=0\.5: give 1"),
        (lambda: SnapKV(pyramid=float("nan")), "pyramid=nan"),
        (lambda: compress(tiny_lm(), SnapKV(max_entries=40, pyramid=9.0)), r"budget of 8 entries"),
        (lambda: ExpectedAttention(covariance="ful"), "covariance='ful'.*Did you mean 'full'"),
        (lambda: ExpectedAttention(max_entries=20), "max_entries=20 leaves nothing beside first_tokens=4"),
        (lambda: SepLLM(recent_tokens=0), "recent_tokens=0"),
        (lambda: SepLLM(separator_ids=["."]), r"give frozenset\[int\]"),
        (lambda: compress(tiny_lm(), "sepllm"), "sepllm goes by token ids that only a tokenizer tells"),
        (lambda: Quantised(bits=3), "bits=3: give one of 8, 4, 2"),
        (lambda: Quantised(held_tokens=100), "held_tokens=100 is no multiple of block_tokens=64"),
        (lambda: Quantised(finer_tokens=128, held_tokens=64), "held_tokens=64 must be a whole number of at least 128"),
        (lambda: Quantised(bits=8, finer_tokens=64), "bits=8 are no fewer than finer_tokens have"),
        (lambda: compress(tiny_lm(), Quantised(max_bytes=1000)), "max_bytes=1000 is too little"),
        (lambda: compress(tiny_lm(), "quantised", removed=0.5), "removed=0.5 can't be asked of it"),
        (lambda: KVzip(removed=1.0), "removed=1.0 must be at least 0 and below 1"),
        (lambda: KVzip(bits=5), "bits=5: give one of 8, 4, 2, or None"),
        (lambda: KVzip(bits=4, chunk_tokens=32), "chunk_tokens=32 are less than block_tokens=64"),
        (lambda: AttentionMatching(ridge=0.0), "ridge=0.0 must be above 0"),
        (lambda: Selection(read_tokens=100), "read_tokens=100 is no multiple of page_tokens=16"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("method", [TOVA(), SnapKV(), ExpectedAttention(), KVzip(), AttentionMatching()])
def test_what_computes_scores_is_refused_where_a_model_caps_them(method):
    with pytest.raises(UnsupportedError, match=f"{method.name} computes scores of its own"):
        compress(tiny_lm("gemma2"), method)


@pytest.mark.parametrize("method", [Quantised(recent_tokens=3, block_tokens=4), Selection(read_tokens=16)])
@torch.no_grad()
def test_what_leaves_scores_to_the_model_runs_where_it_shapes_them(method):
    """Caps, and sinks in the softmax."""
    for family in ("gemma2", "gpt_oss"):
        compressed, ids = compress(tiny_lm(family), method), random_ids(1, 60)
        at_once = compressed(ids, use_cache=False).logits
        # Their eager attention rounds to float32.
        torch.testing.assert_close(step_by_step(compressed, ids), at_once, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["kvzip", "attention_matching"])
@torch.no_grad()
def test_no_second_reading_ends_behind_the_trained_positions(name):
    """What it would have dropped is held; the twin agrees, token by token and at once."""
    method, model, ids = TINY_METHODS[name], tiny_lm("gpt2", n_positions=64), random_ids(1, 64)
    compressed = compress(model, method)
    expected = twins.METHODS[name].expected(model, ids[0].tolist(), compressed.method, None)
    cache = compressed.new_cache(1)
    torch.testing.assert_close(step_by_step(compressed, ids, cache)[0], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(compressed(ids, use_cache=False).logits[0], expected, rtol=0, atol=1e-9)
    chunks = (64 - method.chunk_tokens - method.offset) // method.chunk_tokens
    assert int(cache.num_entries) == 64 - chunks * (method.chunk_tokens - method.kept_tokens)


@pytest.mark.parametrize(
    "method",
    [
        TOVA(max_entries=50),
        SnapKV(max_entries=60, every_tokens=16, observed_tokens=4),
        Quantised(bits=4, recent_tokens=40, block_tokens=4),
        KVzip(removed=0.25, chunk_tokens=16, recent_tokens=4),
        Selection(read_tokens=16, recent_tokens=40, page_tokens=4),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("order", [(20, 70), (70, 20)])
@torch.no_grad()
def test_rows_that_need_unlike_room_are_joined(method, order):
    """More than a block of entries in one, less in the other; whichever comes first."""
    compressed, ids = compress(tiny_lm(), method), random_ids(2, 85)
    at_once = compressed(ids, use_cache=False).logits
    caches = [compressed.new_cache(1) for _ in order]
    for row, (cache, length) in enumerate(zip(caches, order, strict=True)):
        compressed(ids[[row], :length], cache=cache)
    joined, other = caches
    joined.join(other)
    more = torch.stack([ids[row, length : length + 15] for row, length in enumerate(order)])
    expected = torch.stack([at_once[row, length : length + 15] for row, length in enumerate(order)])
    torch.testing.assert_close(step_by_step(compressed, more, joined), expected, rtol=0, atol=1e-9)


@given(
    st.sampled_from(BITS),
    st.integers(1, 5),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.int16, torch.int8]),
    st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_numbers_in_fewer_bits_are_half_a_step_off_at_most(bits, rows, dtype, zero_kind, seed):
    generator = torch.Generator().manual_seed(seed)
    states = (torch.randn(rows, 8, generator=generator) * 3 + 7).to(dtype)
    for dim in (0, 1):
        codes = quantised(states, bits, dim, zero_kind)
        assert codes.codes.dtype == torch.uint8
        assert codes.codes.shape == (rows, 8 * bits // 8)
        off = (dequantised(codes, bits, torch.float64) - states.double()).abs()
        step = sizes(codes.step, torch.float64)
        # What is halfway goes up by a millionth of a step, and a step may lack as much of what it is to reach.
        assert bool((off <= step * (0.5 + 2**bits * 1e-6) + 1e-6).all())
        # A step is what is needed, and up to an eighth of an octave more.
        needed = (states.double().amax(dim, keepdim=True) - states.double().amin(dim, keepdim=True)) / (2**bits - 1)
        wide = needed > states.double().abs().amax() / (2**14 if zero_kind == torch.int16 else 2**6)
        assert bool((step[wide] <= needed[wide] * 2**0.125 * (1 + 1e-5)).all())


@pytest.mark.parametrize("value", [0.0, 2.5, -3e4, 1e-7])
def test_equal_numbers_stay_what_they_are(value):
    states = torch.full((4, 8), value, dtype=torch.float64)
    for zero_kind, error in ((torch.int16, 1e-4), (torch.int8, 1e-2)):
        found = dequantised(quantised(states, 2, 1, zero_kind), 2, torch.float64)
        torch.testing.assert_close(found, states, rtol=error, atol=1e-6)


def test_a_step_of_selection_reads_the_pages_it_chooses():
    """And what is raw, all bounds and positions; with few pages all that is held."""
    method = Selection(read_tokens=8, page_tokens=4, first_tokens=2, recent_tokens=2)
    shape = KVShape(num_layers=3, num_rows=2, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    entry = 2 * 2 * 8 * 4
    for paged, pages_unread in ((0, 0), (8, 0), (12, 1), (40, 8)):
        stored, read = (count((6, paged), shape) for count in (method.store_bytes, method.read_bytes))
        assert stored - read == 3 * 2 * pages_unread * 4 * entry
        assert method.resident_bytes((6, paged), shape) == stored


def test_room_grows_by_a_32nd():
    for number in range(2000):
        assert number <= allotted_blocks(number) <= number * 33 / 32
        assert allotted_blocks(allotted_blocks(number)) == allotted_blocks(number)


@pytest.mark.parametrize(("max_bytes", "family"), [(18_000, "gemma3_text"), (24_000, "llama")])
@torch.no_grad()
def test_tiers_stay_within_their_bytes(max_bytes, family):
    """All that a row's cache comes to, layers with a window included; and little is left unused."""
    ids = random_ids(1, 500)
    method = Quantised(bits=4, recent_tokens=8, block_tokens=8, finer_tokens=16, max_bytes=max_bytes)
    compressed = compress(tiny_lm(family, max_position_embeddings=512), method)
    cache, most = compressed.new_cache(1), 0
    for column in range(ids.shape[1]):
        compressed(ids[:, [column]], cache=cache)
        most = max(most, cache.num_bytes())
    assert most <= max_bytes
    assert most > max_bytes * 0.75


@torch.no_grad()
def test_layers_with_a_window_let_go_of_the_first_tokens():
    """With the first block that leaves them; layers that read all keep both."""
    method = Quantised(bits=4, recent_tokens=4, block_tokens=4, first_tokens=3)
    compressed = compress(tiny_lm("gemma3_text"), method)
    (window,) = {group.window for group in compressed.backbone.groups if group.window is not None}
    cache, held = compressed.new_cache(1), {None: [], window: []}
    for token in random_ids(1, window + 20).unbind(1):
        compressed(token[:, None], cache=cache)
        for group, store in zip(compressed.backbone.groups, cache.store.parts, strict=True):
            held[group.window].append(int(store["position"][0][0, 0, 0]))
    assert set(held[None]) == {0}
    assert held[window][window - 1] == 0
    assert held[window][-1] > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "method",
    [
        TOVA(max_entries=20),
        SnapKV(max_entries=20, every_tokens=8, observed_tokens=4),
        ExpectedAttention(max_entries=24, every_tokens=8, recent_tokens=4),
        Quantised(recent_tokens=4, block_tokens=8),
        KVzip(chunk_tokens=16, recent_tokens=4, bits=4, block_tokens=4),
        AttentionMatching(chunk_tokens=16, recent_tokens=4),
        Selection(read_tokens=16, recent_tokens=4, page_tokens=4),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else str(value),
)
@torch.no_grad()
def test_other_precisions(method, dtype):
    """Close to what float64 gives, as far as the type goes; the formula of bytes holds."""
    model, ids = tiny_lm("llama"), random_ids(1, 50)
    expected = compress(model, method)(ids, use_cache=False).logits
    compressed = compress(tiny_lm("llama").to(dtype), method)
    cache = compressed.new_cache(1)
    found = compressed(ids, cache=cache).logits
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    assert cache.num_bytes() == compressed.cache_bytes([int(part[0]) for part in cache.store.lengths_by_part()], 1)
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)

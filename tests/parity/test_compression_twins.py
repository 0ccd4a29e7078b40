"""Each method against its slow, obvious twin, written from the papers without the package's masks and schedules."""

from __future__ import annotations

import pytest
import torch

import twins
from lms import TINY_METHODS, in_turn, policy, random_ids, step_by_step, tiny_adapter, tiny_compressed, tiny_lm
from thoughtformer.compression import METHODS, Callback, Combiner, Sentinel, compress
from thoughtformer.models.backbone import backbone_of
from thoughtformer.rules.entries import FOREVER, Entries, entries_mask
from thoughtformer.rules.schedule import Event, RowReading, lay_out
from twins.folding import Fold, folded_by_sentinels, folded_into_means

LENGTH = 48
FAMILIES = ["llama", "gpt_neox", "gpt2", "opt", "qwen2", "gemma3_text"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


FOLDS = {
    "none": [],
    "one": [(10, 15, 0)],
    "at_the_start": [(0, 6, 0)],
    "at_the_end": [(40, 47, 0)],
    "all": [(0, 47, 0)],
    "adjacent": [(3, 9, 0), (10, 14, 0), (15, 30, 0)],
    "all_adjacent": [(start, start + 7, 0) for start in range(0, 48, 8)],
    "lag_1": [(3, 9, 1), (10, 14, 1), (20, 30, 1)],
    "lag_16": [(3, 9, 16), (10, 14, 16), (15, 24, 16)],
    "one_token_each": [(start, start, 0) for start in range(5, 20)],
}


@pytest.mark.parametrize(("case", "family"), in_turn(FOLDS, FAMILIES))
@pytest.mark.parametrize(("k", "see_earlier"), [(1, False), (4, False), (2, True)], ids=["k1", "k4", "k2_earlier"])
@torch.no_grad()
def test_sentinels_equal_the_papers_mask(family, k, see_earlier, case):
    """At once, and token by token with the spans really gone."""
    folds = FOLDS[case]
    model = tiny_lm(family)
    adapter = tiny_adapter(model, num_sentinels=k, see_earlier=see_earlier)
    ids = random_ids(1, LENGTH)
    spans = [Fold(start, end, end + lag) for start, end, lag in folds]
    expected = folded_by_sentinels(model, adapter, ids[0].tolist(), spans, see_earlier)
    due = {end + lag: (start, end) for start, end, lag in folds}

    class Fixed(Sentinel):
        """Folds just these spans."""

        def after(self, row, token_id):
            at = row.num_tokens - 1
            return [Event(*due[at], at, True)] if at in due else []

    method = Fixed(num_sentinels=k, see_earlier=see_earlier)
    compressed = compress(model, method, adapter=adapter)
    close(compressed(ids, use_cache=False).logits[0], expected)
    cache = compressed.new_cache(1)
    steps = [compressed(ids[:, [column]], cache=cache).logits for column in range(LENGTH)]
    close(torch.cat(steps, dim=1)[0], expected)
    folded = [(start, end) for start, end, lag in folds if end + lag < LENGTH]
    gone = sum(end - start + 1 - k for start, end in folded)
    assert int(cache.num_entries[0]) == LENGTH - gone


def test_the_papers_toy():
    """t1 t2 CL t3 t4 CR t5 t6, as the specification prints it; columns in the order of the text."""
    chunk = lay_out([RowReading([1, 2, 3, 4, 5, 6], 0, [Event(2, 3, 3, True)])], vocab_size=10, num_summaries=1)
    # Laid out with both sentinels behind the span; the paper has <CL> before it.
    order = [0, 1, 4, 2, 3, 5, 6, 7]
    entries = chunk.entries[:, order]
    assert chunk.input_ids[0, order].tolist() == [1, 2, 10, 3, 4, 11, 5, 6]
    assert entries.position[0].tolist() == [0, 1, 1, 2, 3, 3, 4, 5]
    mask = entries_mask(entries, entries)[0].int()
    rows = ["".join(map(str, row)) for row in mask.tolist()]
    assert rows == [
        "10000000", "11000000", "00100000", "11010000", "11011000", "00111100", "11000110", "11000111",
    ]  # fmt: skip


def test_every_method_has_a_twin():
    missing = set(METHODS) - set(twins.METHODS)
    assert not missing, f"write what {missing} does, slowly, in a file of tests/twins: METHODS = {{...}}"


@pytest.mark.parametrize(("case", "family"), in_turn(TINY_METHODS, FAMILIES))
@torch.no_grad()
def test_methods_equal_their_twins(family, case):
    """At once, and token by token with what was dropped really gone."""
    model, method, ids = tiny_lm(family), TINY_METHODS[case], random_ids(1, LENGTH)
    twin = twins.METHODS[method.name]
    compressed = tiny_compressed(model, method)
    expected = twin.expected(model, ids[0].tolist(), method, compressed.adapter)
    atol = twin.atol if backbone_of(model).rotation is not None else 1e-9
    for actual in (compressed(ids, use_cache=False).logits, step_by_step(compressed, ids)):
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_rotating_a_key_equals_computing_it_elsewhere(family):
    """The rotation that streaming uses is the model's own."""
    model = tiny_lm(family)
    view, ids = backbone_of(model), random_ids(1, 6)
    keys = {}

    def capture(shift):
        def attend(layer, query, key, value, **_):
            keys.setdefault(shift, []).append(key)
            return torch.zeros_like(query)

        view.forward(view.embed(ids), torch.arange(6)[None] + shift, attend)

    capture(0)
    capture(17)
    if view.rotation is None:
        assert family == "gpt2"
        return
    turned = view.rotation(keys[0][0], torch.full((1, 6), 17))
    torch.testing.assert_close(turned, keys[17][0], rtol=0, atol=1e-5)
    assert (keys[0][0] - keys[17][0]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "plain"])
@torch.no_grad()
def test_combiner_against_a_loop(family):
    model, ids = tiny_lm(family), random_ids(1, LENGTH)
    spans = {11: (2, 8), 14: (9, 12), 30: (13, 24)}

    class Fixed(Combiner):
        """Folds just these spans."""

        def after(self, row, token_id):
            at = row.num_tokens - 1
            return [Event(*spans[at], at, True)] if at in spans else []

    expected = folded_into_means(model, ids[0].tolist(), [Fold(*span, at) for at, span in spans.items()])
    close(compress(model, Fixed())(ids).logits[0], expected)


@torch.no_grad()
def test_equal_keys_make_the_combiner_exact():
    """Where a block's keys are equal, its summary is no approximation: the weight log n is right."""
    query = torch.randn(1, 1, 4, dtype=torch.float64)
    key, value = torch.randn(1, 4, dtype=torch.float64).expand(5, 4), torch.randn(5, 4, dtype=torch.float64)
    other_key, other_value = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    whole = (query @ torch.cat([key, other_key]).mT).softmax(-1) @ torch.cat([value, other_value])
    scores = query @ torch.cat([key.mean(0, keepdim=True), other_key]).mT
    scores[..., 0] += torch.tensor(5.0, dtype=torch.float64).log()
    close(scores.softmax(-1) @ torch.cat([value.mean(0, keepdim=True), other_value]), whole)


@torch.no_grad()
def test_sentinels_fed_late_are_the_same_sentinels():
    """A lag moves who reads what, not what the summaries are."""
    model = tiny_lm()
    adapter = tiny_adapter(model)
    ids = random_ids(1, 30)
    summaries = []
    for lag in (0, 9):

        def choose(row, available, lag=lag):
            return 6 if row.num_tokens == 12 + lag and row.next_start == 5 else None

        settings = policy(first_tokens=5, recent_tokens=0, start_tokens=0)
        callback = Callback(choose=choose, first_tokens=settings.first_tokens, recent_tokens=0, start_tokens=0)
        compressed = compress(model, Sentinel(policy=callback), adapter=adapter)
        cache = compressed.new_cache(1)
        compressed(ids[:, : 12 + lag], cache=cache)
        is_summary = (cache.store.field("order")[0, : cache.store.longest] > 0).nonzero()
        assert len(is_summary) == 1
        summaries.append([layer[0, :, int(is_summary[0])] for layer in cache.store.keys])
    for early, late in zip(*summaries):
        close(early, late)


def test_entries_that_no_one_reads():
    entries = Entries(*(torch.tensor([[value]]) for value in (0, 1, 0, FOREVER, FOREVER)))
    token = Entries(*(torch.tensor([[value]]) for value in (5, 0, -1, 5, FOREVER)))
    assert not bool(entries_mask(token, entries))


@torch.no_grad()
def test_nothing_compressed_is_pefts_own_forward(tmp_path):
    """A sentinel adapter over a text that nothing folds, against peft loading the same files by itself."""
    from peft import PeftModel

    from thoughtformer.models.fingerprint import fingerprint

    model = tiny_lm()
    ids = random_ids(2, 30)
    base = fingerprint(model)
    adapter = tiny_adapter(model)
    adapter.save(tmp_path, fingerprint=base)
    compressed = compress(model, Sentinel(policy=policy(start_tokens=100)), adapter=adapter)
    ours = compressed(ids, use_cache=False).logits
    compressed.close()
    plain = model(ids).logits
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(tiny_lm(), tmp_path).double()(ids).logits
    close(ours, theirs)
    assert (ours - plain).abs().max() > 1e-3
    reloaded = compress(model, Sentinel(policy=policy(start_tokens=100)), adapter=tmp_path)
    assert torch.equal(reloaded(ids, use_cache=False).logits, ours)


@pytest.mark.parametrize("family", ["llama", "gpt2", "plain"])
@torch.no_grad()
def test_sentinel_only_lora_leaves_tokens_to_the_base(family):
    """Bit for bit until something folds; then only readers of summaries differ."""
    model = tiny_lm(family)
    ids = random_ids(2, 30)
    base = model(ids).logits
    adapter = tiny_adapter(model, sentinels_only=True)
    method = Sentinel(policy=policy(start_tokens=20))
    compressed = compress(model, method, adapter=adapter)
    assert torch.equal(compressed(ids[:, :19]).logits, model(ids[:, :19]).logits)
    folded = compressed(ids, use_cache=False).logits
    close(folded[:, :20], base[:, :20])
    assert (folded[:, 20:] - base[:, 20:]).abs().max() > 1e-3
    no_lora = tiny_compressed(tiny_lm(family), method)
    assert no_lora.adapter is not None

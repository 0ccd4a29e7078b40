"""Every method: read at once == token by token with eviction, whatever the batch, the chunks, or what came between."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import twins
from lms import (
    DIFFERENT,
    FIRST_SETTINGS,
    TINY_METHODS,
    in_turn,
    longest_rows,
    random_ids,
    step_by_step,
    tiny_compressed,
    tiny_lm,
)
from thoughtformer.cache.entries import BLOCK_ENTRIES, EntrySlots
from thoughtformer.compression import (
    Context,
    Full,
    HeavyHitters,
    Local,
    StreamingLLM,
    Truncation,
    compress,
)
from thoughtformer.compression.method import cached_entries, read_ids
from thoughtformer.errors import CheckpointError, InputError, UnsupportedError
from thoughtformer.rules.schedule import Event, RowProgress

LENGTH = 70


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.fixture(params=list(TINY_METHODS))
def method(request):
    """Each method in turn."""
    return TINY_METHODS[request.param]


@pytest.fixture(params=DIFFERENT)
def family(request):
    """Each kind of architecture in turn."""
    return request.param


#: Each method with one of the architectures, which take turns; its twin meets more of them (test_compression_twins.py).
ON_FAMILIES = pytest.mark.parametrize(("method", "family"), in_turn(TINY_METHODS, always=()), indirect=["method"])
#: One setting of each method.
ONE_SETTING = pytest.mark.parametrize("method", sorted(FIRST_SETTINGS), indirect=True)


@ON_FAMILIES
@torch.no_grad()
def test_at_once_equals_step_by_step(family, method):
    """Also: the cache holds as many entries as the schedule says, in as many bytes as the formula says."""
    ids = random_ids(2, LENGTH)
    compressed = tiny_compressed(tiny_lm(family), method)
    method = compressed.method  # that knows the model's layers
    at_once = compressed(ids, use_cache=False).logits
    cache = compressed.new_cache(2)
    close(step_by_step(compressed, ids, cache), at_once)
    stored = []
    for row_ids, held in zip(ids.tolist(), cache.num_entries.tolist()):
        row = RowProgress()
        read_ids(method, row, row_ids)
        assert row.num_cached == cached_entries(method, [*row_ids, 5])[-1] - 1
        assert held == method.num_stored(row)
        stored.append(compressed.num_stored(row))
    assert cache.num_bytes() == compressed.cache_bytes(longest_rows(cache), 2)
    assert [tuple(row) for row in torch.stack(cache.store.lengths_by_part(), dim=1).tolist()] == stored
    assert cache.get_seq_length() == LENGTH
    if method.name not in ("full", "selection", "lookup"):
        whole = compress(compressed.model, "full")
        row = RowProgress(LENGTH, LENGTH)
        assert cache.num_bytes() < whole.cache_bytes(whole.num_stored(row), 2)


@dataclass(frozen=True, kw_only=True)
class KeepsThirds(Full):
    """Of the tokens that leave a window of five, those whose id is a multiple of three stay."""

    @property
    def reads_ids(self) -> bool:
        return True

    @property
    def window_tokens(self) -> int:
        return 5

    def leaving(self, row, position, token_id):
        if token_id % 3:
            yield Event(position, position, row.num_tokens - 1)


@torch.no_grad()
def test_what_leaves_a_window(tmp_path):
    """A method is told of the token that leaves as well, after a save and a fork, too."""
    model, ids = tiny_lm(), random_ids(1, LENGTH)
    text = ids[0].tolist()
    reads = [[p for p in range(j + 1) if p >= j - 5 or text[p] % 3 == 0] for j in range(LENGTH)]
    allowed = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for j, positions in enumerate(reads):
        allowed[j, positions] = True
    expected = twins.masked(model, model.get_input_embeddings()(ids[0]), torch.arange(LENGTH), allowed)
    compressed = compress(model, KeepsThirds())
    close(compressed(ids, use_cache=False).logits[0], expected)
    context = Context.read(compressed, ids[0, :40])
    context.save(tmp_path / "context")
    for cache in (
        context.cache,
        context.cache.fork_rows(torch.tensor([0])),
        Context.load(compressed, tmp_path / "context").cache,
    ):
        assert cache.rows[0].window == text[35:40]
        close(step_by_step(compressed, ids[:, 40:], cache)[0], expected[40:])


@ON_FAMILIES
@torch.no_grad()
def test_compression_changes_something(family, method):
    """Else all other tests here would pass with the method switched off."""
    if method.name == "full":
        pytest.skip("changes nothing")
    ids = random_ids(1, LENGTH)
    compressed = tiny_compressed(tiny_lm(family), method)
    # With the adapter's LoRA, nothing folded.
    base = compressed.model(ids).logits
    assert (compressed(ids).logits - base).abs().max() > 1e-3


@pytest.mark.parametrize("execution", ["dense", "flex"])
@torch.no_grad()
def test_executions_agree(execution, method):
    if method.needs_store:
        pytest.skip("runs one way")
    if execution == "flex":
        # torch says that uncompiled FlexAttention is slow; compiling takes minutes.
        pytest.importorskip("torch.nn.attention.flex_attention")
    ids = random_ids(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    compressed = tiny_compressed(tiny_lm(), method)
    gathered = compressed(ids, attention_mask=mask, use_cache=False).logits
    compressed.execution = execution
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        other = compressed(ids, attention_mask=mask, use_cache=False).logits
    close(other, gathered)


@ONE_SETTING
@pytest.mark.parametrize("prefill_tokens", [1, 7, 32])
@torch.no_grad()
def test_chunked_prefill_then_steps(prefill_tokens, method):
    """A long prompt in bounded pieces, then decoding."""
    ids = random_ids(2, LENGTH)
    compressed = tiny_compressed(tiny_lm(), method)
    at_once = compressed(ids, use_cache=False).logits
    compressed.prefill_tokens = prefill_tokens
    cache = compressed.new_cache(2)
    first = compressed(ids[:, :50], cache=cache).logits
    assert cache.num_bytes() == compressed.cache_bytes(longest_rows(cache), 2)
    second = compressed(ids[:, 50:60], cache=cache).logits
    close(torch.cat([first, second, step_by_step(compressed, ids[:, 60:], cache)], dim=1), at_once)


@ON_FAMILIES
@torch.no_grad()
def test_rows_do_not_depend_on_their_neighbours(family, method):
    """Ragged rows, padded at the left, prefilled in pieces and decoded: each as if it were alone."""
    compressed = tiny_compressed(tiny_lm(family), method, prefill_tokens=16)
    lengths = [40, 9, 27]
    ids, mask = random_ids(3, 40, seed=3), torch.zeros(3, 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 40 - length :] = 1
    more = random_ids(3, 12, seed=4)
    cache = compressed.new_cache(3)
    prompt = compressed(ids, attention_mask=mask, cache=cache).logits
    steps = step_by_step(compressed, more, cache)
    for row, length in enumerate(lengths):
        alone = torch.cat([ids[row, 40 - length :], more[row]])[None]
        expected = compressed(alone, use_cache=False).logits[0]
        close(prompt[row, 40 - length :], expected[:length])
        close(steps[row], expected[length:])


@torch.no_grad()
def test_a_row_of_the_future_is_unread(method):
    """Changing a later token changes no earlier logits."""
    compressed = tiny_compressed(tiny_lm(), method)
    ids = random_ids(1, LENGTH)
    other = ids.clone()
    other[0, 50:] = (other[0, 50:] + 1) % 30 + 3
    close(compressed(other).logits[:, :50], compressed(ids).logits[:, :50])


@ONE_SETTING
@torch.no_grad()
def test_fork_select_save_load_append(method, tmp_path):
    """What was forked, reordered, or written and read goes on as if nothing had happened."""
    compressed = tiny_compressed(tiny_lm(), method)
    ids = random_ids(2, LENGTH)
    at_once = compressed(ids, use_cache=False).logits
    cache = compressed.new_cache(2)
    compressed(ids[:, :45], cache=cache)
    fork = cache.fork()
    step_by_step(compressed, random_ids(2, 8, seed=9), cache)
    fork.select([1, 0, 1])
    close(step_by_step(compressed, ids[[1, 0, 1], 45:], fork), at_once[[1, 0, 1], 45:])

    # Rows of unlike length, each with a past of its own.
    mask = torch.ones_like(ids[:, :45])
    mask[0, :20] = 0
    ragged = compressed.new_cache(2)
    compressed(ids[:, :45], attention_mask=mask, cache=ragged)
    ragged.reorder_cache(torch.tensor([1, 0]))
    steps = step_by_step(compressed, ids[[1, 0], 45:], ragged)
    close(steps[0], at_once[1, 45:])
    close(steps[1], compressed(ids[:1, 20:], use_cache=False).logits[0, 25:])

    if method.can_join:
        joined, short = compressed.new_cache(1), compressed.new_cache(1)
        compressed(ids[:1, :45], cache=joined)
        compressed(ids[1:, :20], cache=short)
        short.join(joined)
        steps = step_by_step(compressed, torch.stack([ids[1, 20:45], ids[0, 45:70]]), short)
        close(steps, torch.stack([at_once[1, 20:45], at_once[0, 45:70]]))

    context = Context.read(compressed, ids[0, :45])
    context.save(tmp_path / "a.ctx")
    loaded = Context.load(compressed, tmp_path / "a.ctx")
    assert loaded.num_bytes() == context.num_bytes()
    assert loaded.ids == ids[0, :45].tolist()
    loaded.append(ids[0, 45:55])
    close(step_by_step(compressed, ids[:1, 55:], loaded.cache), at_once[:1, 55:])
    close(step_by_step(compressed, ids[:1, 45:], context.cache), at_once[:1, 45:])


@torch.no_grad()
def test_a_failed_pass_leaves_the_cache_as_it_was(family, monkeypatch):
    compressed = tiny_compressed(tiny_lm(family), TINY_METHODS["sentinel"])
    ids = random_ids(2, LENGTH)
    at_once = compressed(ids, use_cache=False).logits
    compressed.prefill_tokens = 8
    cache = compressed.new_cache(2)
    compressed(ids[:, :40], cache=cache)
    before = cache.num_bytes()
    calls = []

    def failing(*args, forward=compressed.backbone.forward):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(compressed.backbone, "forward", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            compressed(ids[:, 40:60], cache=cache)
    assert cache.num_bytes() == before
    close(step_by_step(compressed, ids[:, 40:], cache), at_once[:, 40:])


@torch.no_grad()
def test_caches_and_contexts_of_others_are_refused(tmp_path):
    ids = random_ids(1, 40)
    one = tiny_compressed(tiny_lm("llama"), TINY_METHODS["sentinel"])
    other = tiny_compressed(tiny_lm("qwen2"), TINY_METHODS["sentinel"])
    local = tiny_compressed(tiny_lm("llama"), Local(removed=0.5))
    cache = one.new_cache(1)
    one(ids, cache=cache)
    with pytest.raises(InputError, match="model was"):
        other(ids, cache=cache)
    with pytest.raises(InputError, match="method was 'sentinel', is 'local'"):
        local(ids, cache=cache)
    with pytest.raises(InputError, match="2 rows"):
        one(ids, cache=one.new_cache(2))

    path = tmp_path / "a.ctx"
    Context.read(one, ids[0]).save(path)
    with pytest.raises(CheckpointError, match="model was"):
        Context.load(other, path)
    with pytest.raises(CheckpointError, match="span_tokens"):
        Context.load(tiny_compressed(tiny_lm("llama"), TINY_METHODS["sentinel_lag16"]), path)
    content = path.read_bytes()
    for name, damaged in (("short", content[:-200]), ("header", content[:20]), ("foreign", b"PK" + content)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            Context.load(one, tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ctx", "foreign", "header", "short"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["sentinel_lag0", "streaming"])
def test_weights_that_change_end_contexts(tmp_path, name):
    """What some weights computed, others don't go on with, nor sign as theirs; also those of an adapter."""
    compressed = tiny_compressed(tiny_lm(), TINY_METHODS[name])
    ids = random_ids(1, 40)
    context = Context.read(compressed, ids[0])
    expected = context.generate(ids[:, :3], max_new_tokens=4)
    weights = [compressed.model.model.layers[0].mlp.up_proj.weight]
    weights += [] if compressed.adapter is None else [compressed.adapter.rows]
    for weight in weights:
        weight.data.neg_()
        for call in (lambda: context.fork().generate(ids[:, :3]), lambda: context.save(tmp_path / "a.ctx")):
            with pytest.raises(InputError, match="weights have changed since this context"):
                call()
        weight.data.neg_()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(context.generate(ids[:, :3], max_new_tokens=4), expected)


@torch.no_grad()
def test_a_long_prompt_is_read_in_bounded_memory(monkeypatch):
    """While 190 tokens are read in pieces of 16, no more is allotted than what is kept, one piece and its sentinels."""
    compressed = tiny_compressed(tiny_lm(), TINY_METHODS["sentinel_lag0"], prefill_tokens=16)
    cache, allotted = compressed.new_cache(2), []
    extend = EntrySlots.extend_rows

    def watched(slots, *args):
        result = extend(slots, *args)
        allotted.append(slots.capacity)
        return result

    monkeypatch.setattr(EntrySlots, "extend_rows", watched)
    compressed(random_ids(2, 190), cache=cache)
    kept = int(cache.num_entries.max())
    assert kept < 60
    sentinels = 2 * (16 // 5 + 1)
    assert max(allotted) <= -(-(kept + 16 + sentinels) // BLOCK_ENTRIES) * BLOCK_ENTRIES
    assert len(allotted) == 12


@torch.no_grad()
def test_logits_at_chosen_columns():
    """In the order asked for, columns named twice or padded in some row included."""
    compressed = tiny_compressed(tiny_lm(), TINY_METHODS["sentinel"])
    ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    whole = compressed(ids, attention_mask=mask, use_cache=False).logits
    for columns in ([29], [20, 3, 29], [7, 7, 2]):
        some = compressed(ids, attention_mask=mask, use_cache=False, logits_to_keep=torch.tensor(columns)).logits
        close(some, whole[:, columns])


@torch.no_grad()
@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (HeavyHitters(max_entries=14), HeavyHitters(max_entries=10), "at most 14"),
        (StreamingLLM(max_entries=20), StreamingLLM(max_entries=8), "'max_entries': 20.*'max_entries': 8"),
        (Truncation(piece_tokens=13), Truncation(piece_tokens=20), "'piece_tokens': 13"),
    ],
    ids=["h2o", "streaming", "truncation"],
)
def test_a_cache_of_other_settings_is_refused(one, other, message):
    model = tiny_lm()
    cache = tiny_compressed(model, one).new_cache(1)
    with pytest.raises(InputError, match=message):
        tiny_compressed(model, other)(random_ids(1, 5), cache=cache)
    tiny_compressed(model, one)(random_ids(1, 5), cache=cache)


@torch.no_grad()
def test_a_pass_of_padding_alone_reads_nothing(family):
    compressed = tiny_compressed(tiny_lm(family), Local(removed=0.5))
    ids, cache = random_ids(1, 30), compressed.new_cache(1)
    compressed(ids[:, :28], cache=cache)
    nothing = compressed(ids[:, :2], attention_mask=torch.zeros(1, 2, dtype=torch.long), cache=cache)
    assert not nothing.logits.any()
    close(compressed(ids[:, 28:], cache=cache).logits, compressed(ids, use_cache=False).logits[:, 28:])


@pytest.mark.parametrize("wrong", [40, 41, -1])
def test_ids_outside_the_vocabulary_are_no_sentinels(wrong):
    compressed = tiny_compressed(tiny_lm(), TINY_METHODS["sentinel"])
    with pytest.raises(InputError, match=f"row 1 has the id {wrong}, but the vocabulary has 40"):
        compressed(torch.tensor([[5, 6, 7], [5, wrong, 6]]))


@pytest.mark.parametrize(("name", "family"), in_turn(sorted(TINY_METHODS), always=()))
def test_gradients_pass_every_method_that_can_be_trained_through(family, name):
    """What keeps its entries in a store must not overwrite what gradients need."""
    compressed, ids = tiny_compressed(tiny_lm(family), TINY_METHODS[name]), random_ids(2, LENGTH)
    compressed.train().requires_grad_(True)  # a sentinels' adapter comes frozen, and freezes its base
    if not TINY_METHODS[name].can_train:
        with pytest.raises(UnsupportedError, match="can't be trained through"):
            compressed(ids, labels=ids)
        with torch.no_grad():
            assert compressed(ids, labels=ids).loss.isfinite()
        return
    compressed(ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in compressed.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@torch.no_grad()
def test_a_context_is_one_text():
    compressed = tiny_compressed(tiny_lm(), Local(removed=0.5))
    with pytest.raises(InputError, match=r"shape \(2, 5\); a context holds one text"):
        Context.read(compressed, random_ids(2, 5))
    context = Context.read(compressed, random_ids(1, 5))
    assert len(context.ids) == 5
    with pytest.raises(InputError, match=r"shape \(2, 5\)"):
        context.generate(random_ids(2, 5), max_new_tokens=2)

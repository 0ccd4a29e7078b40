"""Caches: bytes against the formula, forks, selections, rollbacks; each equals starting over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from conftest import END, START, TEXTS, entries_expected, random_text, tiny_model
from thoughtformer.bench.synthetic import filled_cache
from thoughtformer.cache import distinct_storage_bytes
from thoughtformer.cache.slots import allotted
from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.rules import RowCounters, read_structure

ATOL = 1e-9


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


def test_bytes_equal_the_formula_at_every_step(model):
    ids = torch.cat([TEXTS["long_sentence"], TEXTS["two_documents"]])
    cache = model.new_cache(1)
    with torch.no_grad():
        for count in range(1, len(ids) + 1):
            model(ids[None, count - 1 : count], cache=cache)
            expected = entries_expected(model, ids[:count])
            assert {stage.name: int(stage.lengths[0]) for stage in cache.stages} == expected
            assert cache.num_bytes() == model.model.cache_bytes(expected, num_rows=1)


def test_bytes_after_ragged_prefill(model):
    rows = [TEXTS["mixed"], TEXTS["long_sentence"], TEXTS["one_token"]]
    cache = model.new_cache(3)
    row = torch.cat([torch.full((len(ids),), number) for number, ids in enumerate(rows)])
    with torch.no_grad():
        model.ragged_logits(torch.cat(rows), row, cache)
    expected = [entries_expected(model, ids) for ids in rows]
    longest = {name: max(entries[name] for entries in expected) for name in expected[0]}
    assert cache.num_bytes() == model.model.cache_bytes(longest, num_rows=3)


def test_storage_is_counted_once():
    base = torch.zeros(1000)
    assert distinct_storage_bytes([base, base[10:20], base.view(10, 100)]) == 4000
    assert distinct_storage_bytes([base[:1]]) == 4000  # a view keeps all of it alive


@pytest.mark.parametrize("drafted", [1, 5, 12])
@pytest.mark.parametrize("accepted", [0, 1, 4, 12])
def test_rollback_and_partial_commit(model, drafted, accepted):
    """Uncommitted tokens see each other; taking back any of them leaves no trace, sentence ends included."""
    accepted = min(accepted, drafted)
    prompt = TEXTS["mixed"][:33]
    draft = torch.tensor([7, END, 8, 9, END, END, 10, START, 11, END, 12, 13])[:drafted]
    following = random_text(15, seed=90)[1:]
    cache = model.new_cache(1)
    with torch.no_grad():
        model(prompt[None], cache=cache)
        cache.autocommit = False
        sizes = [2] * (drafted // 2) + [1] * (drafted % 2)
        drafts = torch.cat([model(part[None], cache=cache).logits[0] for part in draft.split(sizes)])
        cache.commit(torch.tensor([accepted])) if accepted else cache.rollback()
        cache.autocommit = True
        continued = torch.cat([model(token[None], cache=cache).logits[0] for token in following.split(1)])
        close(drafts, model(torch.cat([prompt, draft])[None], use_cache=False).logits[0, 33:])
        whole = torch.cat([prompt, draft[:accepted], following])
        close(continued, model(whole[None], use_cache=False).logits[0, 33 + accepted :])
    assert cache.num_bytes() == model.model.cache_bytes(entries_expected(model, whole), num_rows=1)


def test_partial_commit_differs_by_row(model):
    prompts = torch.stack([TEXTS["mixed"][:20], TEXTS["mixed"][20:40]])
    drafts = torch.tensor([[7, END, 8, 9], [END, 5, 6, END]])
    cache = model.new_cache(2)
    with torch.no_grad():
        model(prompts, cache=cache)
        cache.autocommit = False
        model(drafts, cache=cache)
        cache.commit(torch.tensor([1, 3]))
        cache.autocommit = True
        following = model(torch.tensor([[4, 5], [6, END]]), cache=cache).logits
        for row, (accepted, new) in enumerate([(1, [4, 5]), (3, [6, END])]):
            whole = torch.cat([prompts[row], drafts[row, :accepted], torch.tensor(new)])
            close(following[row], model(whole[None], use_cache=False).logits[0, -2:])


def test_commit_of_more_than_there_is_refused(model):
    cache = model.new_cache(1)
    cache.autocommit = False
    with torch.no_grad():
        model(torch.tensor([[START, 5]]), cache=cache)
    with pytest.raises(InputError, match=r"num_tokens=\[3\].*\[2\] tokens are uncommitted"):
        cache.commit(torch.tensor([3]))
    cache.commit()
    with pytest.raises(InputError, match=r"num_tokens=\[1\].*\[0\] tokens are uncommitted"):
        cache.commit(torch.tensor([1]))
    cache.commit(torch.tensor([0]))
    assert cache.num_tokens.tolist() == [2]


def test_generate_goes_on_from_a_partial_commit(model):
    """transformers asks the cache how many columns it has seen, and reads what comes after."""
    ids = TEXTS["mixed"][None, :30]
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids[:, :15], cache=cache)
        cache.autocommit = False
        model(ids[:, 15:24], cache=cache)
    cache.commit(torch.tensor([4]))
    cache.autocommit = True
    assert cache.get_seq_length() == 19
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, cache=cache, **settings), model.generate(ids, **settings))
    assert cache.num_tokens.tolist() == [33]


def test_commit_counts_the_row_that_keeps_most(model):
    cache = model.new_cache(2)
    cache.autocommit = False
    with torch.no_grad():
        model(torch.tensor([[START, 5, 6], [START, 7, END]]), cache=cache)
    cache.commit(torch.tensor([1, 2]))
    assert cache.get_seq_length() == 2


def test_foreign_cache_is_refused(model):
    with pytest.raises(InputError, match=r"DynamicCache.*model.new_cache"):
        model(torch.tensor([[START, 5]]), cache=DynamicCache())


def test_fork_shares_no_storage(model):
    cache = model.new_cache(1)
    left, right = random_text(20, seed=11)[1:], random_text(20, seed=12)[1:]
    prompt = TEXTS["mixed"]
    with torch.no_grad():
        model(prompt[None], cache=cache)
        fork = cache.fork()
        own = {tensor.untyped_storage().data_ptr() for stage in cache.stages for tensor in stage.tensors()}
        assert own.isdisjoint(t.untyped_storage().data_ptr() for stage in fork.stages for t in stage.tensors())
        for ids, held in ((left, cache), (right, fork)):
            logits = torch.cat([model(token[None], cache=held).logits[0] for token in ids.split(1)])
            close(logits, model(torch.cat([prompt, ids])[None], use_cache=False).logits[0, len(prompt) :])


def test_selected_rows_go_on_as_alone(model):
    """Rows dropped, swapped and doubled, as beams do."""
    rows = [TEXTS["mixed"][:40], TEXTS["mixed"][30:70], TEXTS["no_end"].repeat(2)[:40]]
    cache = model.new_cache(3)
    following = torch.stack([random_text(12, seed=20 + number)[1:] for number in range(4)])
    chosen = [2, 0, 0, 1]
    with torch.no_grad():
        model(torch.stack(rows), cache=cache)
        cache.reorder_cache(torch.tensor(chosen))
        stepped = torch.cat([model(c, cache=cache).logits for c in following.split(1, dim=1)], dim=1)
        for number, row in enumerate(chosen):
            whole = torch.cat([rows[row], following[number]])
            close(stepped[number], model(whole[None], use_cache=False).logits[0, 40:])
    assert cache.get_seq_length() == 51


def test_selecting_uncommitted_rows_is_refused(model):
    cache = model.new_cache(1)
    cache.autocommit = False
    with torch.no_grad():
        model(torch.tensor([[START, 5]]), cache=cache)
    with pytest.raises(UnsupportedError, match="commit"):
        cache.select(torch.tensor([0]))


def test_crop_is_refused(model):
    with pytest.raises(UnsupportedError, match="rollback"):
        model.new_cache(1).crop(1)


def test_failed_step_leaves_the_cache_as_it_was():
    """A text past the limit is refused, and the next step goes on from before it."""
    model = tiny_model("hybrid", max_position_embeddings=24)
    cache, ids = model.new_cache(1), TEXTS["mixed"][:24]
    with torch.no_grad():
        model(ids[None, :20], cache=cache)
        original = model.model.norm.forward
        model.model.norm.forward = lambda states: 1 / 0  # fails after every stage has written
        with pytest.raises(ZeroDivisionError):
            model(ids[None, 20:22], cache=cache)
        model.model.norm.forward = original
        with pytest.raises(ValueError, match=r"25 tokens.*trained for 24"):
            model(torch.full((1, 5), 9), cache=cache)
        after = model(ids[None, 20:], cache=cache).logits[0]
        close(after, model(ids[None], use_cache=False).logits[0, 20:])


def test_reset_starts_over(model):
    cache = model.new_cache(1)
    with torch.no_grad():
        model(TEXTS["mixed"][None], cache=cache)
        cache.autocommit = False
        model(TEXTS["one_token"][None], cache=cache)
        cache.reset()
        cache.autocommit = True
        logits = model(TEXTS["two_documents"][None], cache=cache).logits
        close(logits, model(TEXTS["two_documents"][None], use_cache=False).logits)


def test_structure_in_chunks_equals_at_once(text):
    """Sentence and document counters carried from chunk to chunk."""
    special = {"sentence_end_token_id": END, "document_start_token_id": START}
    whole = read_structure(text, torch.zeros_like(text), RowCounters.zeros(1), **special)
    for chunk in (1, 2, 5):
        counters, parts = RowCounters.zeros(1), []
        for ids in text.split(chunk):
            parts.append(read_structure(ids, torch.zeros_like(ids), counters, **special))
            counters = counters.after(parts[-1])
        for name in ("document", "sentence", "offset", "position", "is_end"):
            assert torch.cat([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist(), name


def test_a_reserve_is_held_from_the_start_and_given_back():
    """Where all is held, one allotment serves until it is full; formula, select and logits go with it."""
    model = tiny_model("causal", num_encoder_layers=0)
    cache = model.new_cache(2)
    cache.reserve(100)
    storage = cache.stages[0].keys[0].data_ptr()
    ids = torch.stack([random_text(100, seed=seed) for seed in (1, 2)])
    with torch.no_grad():
        steps = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(90)], dim=1)
        torch.testing.assert_close(steps, model(ids[:, :90]).logits, rtol=0, atol=1e-9)
    assert cache.stages[0].keys[0].data_ptr() == storage
    assert cache.num_bytes() == model.model.cache_bytes({"body": 90}, num_rows=2, reserve_tokens=100)
    cache.select(torch.tensor([1]))
    assert cache.num_bytes() == model.model.cache_bytes({"body": 90}, num_rows=1, reserve_tokens=100)
    cache.reserve(0)
    assert cache.num_bytes() == model.model.cache_bytes({"body": 90}, num_rows=1)


def test_what_folds_reserves_nothing():
    model = tiny_model("hybrid")
    cache, plain = model.new_cache(1), model.new_cache(1)
    cache.reserve(1000)
    assert cache.num_bytes() == plain.num_bytes()


def test_long_caches_are_read_by_two_products(monkeypatch):
    """The same function as the fused kernel, which short caches take."""
    model = tiny_model("causal", num_encoder_layers=0, num_key_value_heads=2)
    ids = torch.stack([random_text(40, seed=seed) for seed in (1, 2)])

    def steps() -> Tensor:
        cache = model.new_cache(2)
        with torch.no_grad():
            return torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(40)], dim=1)

    fused = steps()
    monkeypatch.setattr("thoughtformer.attention.cached.LONG_KEYS", 7)
    products = steps()
    close(products, fused)
    assert torch.equal(products[:, :6], fused[:, :6])
    assert not torch.equal(products[:, 6:], fused[:, 6:])


@pytest.mark.parametrize(
    ("entries", "slots"),
    [(0, 16), (15, 16), (16, 32), (188, 192), (255, 256), (256, 288), (511, 512), (512, 576), (1334, 1344)],
)
def test_blocks_grow_with_the_cache_to_an_eighth_of_it(entries, slots):
    assert allotted(entries, 16, 4) == slots
    assert allotted(entries, 16) == -(-(entries + 1) // 16) * 16


def test_a_long_folded_cache_is_seldom_copied():
    """Three sentences on top of 610 entries: the open one comes and goes within the block."""
    model = tiny_model("hybrid", max_position_embeddings=1 << 20)
    cache = filled_cache(model, num_rows=1, context=25 * 610)
    storages = set()
    with torch.inference_mode():
        for position in range(25 * 3):
            model(torch.tensor([[END if position % 25 == 24 else 5]]), cache=cache)
            storages.add(cache.stages[1].capacity)
            longest = {stage.name: stage.longest for stage in cache.stages}
            assert cache.num_bytes() == model.model.cache_bytes(longest, num_rows=1)
    assert storages == {640}

"""Each method against its slow, obvious twin, written from the papers without the package's masks and schedules."""

from __future__ import annotations

import pytest
import torch

from lms import policy, random_ids, tiny_adapter, tiny_compressed, tiny_lm
from thoughtformer.attention.entries import FOREVER, Entries, entries_mask
from thoughtformer.attention.schedule import Event, RowReading, lay_out
from thoughtformer.compression import (
    Callback,
    Combiner,
    HeavyHitters,
    Local,
    RandomEviction,
    Scattered,
    Sentinel,
    StreamingLLM,
    Truncation,
    compress,
)
from thoughtformer.models.backbone import backbone_of

LENGTH = 48
FAMILIES = ["llama", "gpt_neox", "gpt2", "opt", "qwen2"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def masked(model, embeddings, positions, allowed):
    """The model itself under a mask of transformers' kind; its eager attention would round to float32."""
    mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill_(~allowed, torch.finfo(model.dtype).min)
    return model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=mask[None, None], use_cache=False
    ).logits


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def naive_sentinel(model, adapter, ids, folds, see_earlier=False):
    """The paper's sequence, sentinels right behind their span, and its mask entry by entry.

    `folds` are (start, end, lag), end included.
    """
    k = adapter.config.num_sentinels
    items = []  # kind, number, position, span
    spans = {end: number for number, (_, end, _) in enumerate(folds)}
    inside = {p: number for number, (start, end, _) in enumerate(folds) for p in range(start, end + 1)}
    for position in range(len(ids)):
        items.append(("token", position, position, inside.get(position)))
        if position in spans:
            number = spans[position]
            items.append(("CL", 0, max(folds[number][0] - 1, 0), number))
            items += [("CR", i, position, number) for i in range(1, k + 1)]
    size = len(items)
    allowed = torch.zeros(size, size, dtype=torch.bool)
    for i, (kind, number, position, span) in enumerate(items):
        for j, (key_kind, key_number, key_position, key_span) in enumerate(items):
            if i == j:
                seen = True
            elif kind == "CL":
                seen = False
            elif kind == "CR":
                seen = key_span == span and (key_kind in ("token", "CL") or key_number < number)
                if see_earlier and key_kind == "CR" and key_span != span:
                    when = (folds[span][1] + folds[span][2], span)
                    seen = (folds[key_span][1] + folds[key_span][2], key_span) < when
            elif key_kind == "CL" or key_position > position or (key_kind == "token" and key_number > number):
                seen = False
            elif key_span is None:
                seen = True
            else:
                _, end, lag = folds[key_span]
                within_lag = position <= end + lag
                seen = within_lag if key_kind == "token" else not within_lag
            allowed[i, j] = seen
    token_ids = torch.tensor([ids[number] if kind == "token" else 0 for kind, number, *_ in items])
    embeddings = model.get_input_embeddings()(token_ids).clone()
    for i, (kind, number, *_) in enumerate(items):
        if kind != "token":
            embeddings[i] = adapter.rows[0 if kind == "CL" else number]
    positions = torch.tensor([position for _, _, position, _ in items])
    logits = masked(model, embeddings[None], positions[None], allowed)[0]
    return logits[[i for i, item in enumerate(items) if item[0] == "token"]]


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("k", "see_earlier"), [(1, False), (4, False), (2, True)], ids=["k1", "k4", "k2_earlier"])
@pytest.mark.parametrize("folds", list(FOLDS.values()), ids=list(FOLDS))
@torch.no_grad()
def test_sentinels_equal_the_papers_mask(family, k, see_earlier, folds):
    """At once, and token by token with the spans really gone."""
    if k > 1 and family not in ("llama", "gpt2"):
        pytest.skip("one rotary and one learned family suffice")
    model = tiny_lm(family)
    adapter = tiny_adapter(model, num_sentinels=k, see_earlier=see_earlier)
    ids = random_ids(1, LENGTH)
    expected = naive_sentinel(model, adapter, ids[0].tolist(), folds, see_earlier)
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
    steps = [compressed(ids[:, [column]], past_key_values=cache).logits for column in range(LENGTH)]
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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_local_truncation_scattered_random(family):
    model = tiny_lm(family)
    ids = random_ids(1, LENGTH)
    embeddings, positions = model.get_input_embeddings()(ids), torch.arange(LENGTH)[None]
    j, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]

    allowed = causal(LENGTH) & (k >= (j * 0.6).floor())
    close(compress(model, Local(removed=0.6))(ids).logits, masked(model, embeddings, positions, allowed))

    allowed = causal(LENGTH) & (j // 13 == k // 13)
    close(compress(model, Truncation(piece_tokens=13))(ids).logits, masked(model, embeddings, positions, allowed))

    # The kept positions are read off the cache; that they are one vector for all queries is the mask's claim.
    scattered = compress(model, Scattered(removed=0.6, seed=3))
    cache = scattered.new_cache(1)
    actual = scattered(ids, past_key_values=cache).logits
    kept = torch.zeros(LENGTH, dtype=torch.bool)
    kept[cache.store.field("position")[0, : cache.store.longest].long()] = True
    assert 8 < int(kept.sum()) < 32
    allowed = causal(LENGTH) & (kept[None] | torch.eye(LENGTH, dtype=torch.bool))
    close(actual, masked(model, embeddings, positions, allowed))

    # Random eviction replayed from what the cache held after each token.
    method = RandomEviction(max_entries=15, first_tokens=2, recent_tokens=4, seed=1)
    compressed = compress(model, method)
    cache, allowed = compressed.new_cache(1), torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for column in range(LENGTH):
        held = cache.store.field("position")[0, : cache.store.longest].long()
        allowed[column, held] = True
        allowed[column, column] = True
        compressed(ids[:, [column]], past_key_values=cache)
    assert int(allowed.sum(dim=1).max()) == 15
    assert bool(allowed[:, :2].tril().equal(causal(LENGTH)[:, :2]))
    assert bool((allowed[20:].long().sum(dim=1) == 15).all())
    close(compressed(ids).logits, masked(model, embeddings, positions, allowed))


def attention_by_hand(model, ids, attend):
    """Logits with a layer's attention written out by `attend(layer, q, k, v)` over one row."""
    view = backbone_of(model)

    def handed(layer, query, key, value, *, scale, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return attend(layer, query[0] * scale, key[0], value[0])[None]

    hidden = view.forward(view.embed(ids), torch.arange(ids.shape[1])[None], handed)
    return view.head()(hidden)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_streaming_counts_positions_in_the_cache(family):
    """With rotations: keys as if rotated at their place in the cache. With learned positions: the window alone."""
    model, ids, first, size = tiny_lm(family), random_ids(1, LENGTH), 3, 14
    turn = backbone_of(model).rotation

    def attend(layer, query, key, value):
        output = torch.zeros_like(query)
        for j in range(LENGTH):
            held = list(range(j + 1)) if j < size else [*range(first), *range(j + 1 - (size - first), j + 1)]
            assert len(held) == min(j + 1, size)
            q, k = query[:, j : j + 1], key[:, held]
            if turn is not None:
                # Every key and the query move from their place in the text to their place in the cache.
                moved = torch.tensor([[place - p for place, p in enumerate(held)]])
                k = turn(k[None], moved)[0]
                q = turn(q[None], torch.tensor([[len(held) - 1 - j]]))[0]
            output[:, j : j + 1] = (q @ k.mT).softmax(dim=-1) @ value[:, held]
        return output

    expected = attention_by_hand(model, ids, attend)
    # Rotations are computed in float32, as transformers does: turning twice differs in the seventh digit.
    actual = compress(model, StreamingLLM(max_entries=size, first_tokens=first))(ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4 if turn is not None else 1e-9)


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
def test_h2o_against_a_loop(family):
    """Algorithm 1 for each layer and key head, with lists; and the mask replayed from its decisions."""
    model, ids, size, recent = tiny_lm(family), random_ids(1, LENGTH), 14, 7
    kv_heads = backbone_of(model).num_kv_heads

    def attend(layer, query, key, value):
        heads = query.shape[0]
        groups = heads // kv_heads
        output = torch.zeros_like(query)
        for kv_head in range(kv_heads):
            members = range(kv_head * groups, (kv_head + 1) * groups)
            held, gained = [], {}
            for j in range(LENGTH):
                if len(held) == size:
                    older = [p for p in held if p <= j - 1 - recent]
                    held.remove(min(older, key=lambda p: (gained[p], p)))
                held.append(j)
                gained[j] = 0.0
                for head in members:
                    weights = (query[head, j] @ key[head, held].mT).softmax(dim=-1)
                    output[head, j] = weights @ value[head, held]
                    for p, weight in zip(held, weights.tolist()):
                        gained[p] += weight
        return output

    expected = attention_by_hand(model, ids, attend)
    close(compress(model, HeavyHitters(max_entries=size, recent_fraction=0.5))(ids).logits, expected)


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

    def attend(layer, query, key, value):
        output = torch.zeros_like(query)
        for j in range(LENGTH):
            folded = [span for at, span in spans.items() if at < j]
            raw = [p for p in range(j + 1) if not any(start <= p <= end for start, end in folded)]
            keys, values, bias = [key[:, p] for p in raw], [value[:, p] for p in raw], [0.0] * len(raw)
            for start, end in folded:
                keys.append(key[:, start : end + 1].mean(dim=1))
                values.append(value[:, start : end + 1].mean(dim=1))
                bias.append(float(torch.tensor(float(end - start + 1), dtype=torch.float64).log()))
            scores = torch.einsum("hd,khd->hk", query[:, j], torch.stack(keys)) + torch.tensor(bias, dtype=query.dtype)
            output[:, j] = torch.einsum("hk,khd->hd", scores.softmax(dim=-1), torch.stack(values))
        return output

    close(compress(model, Fixed())(ids).logits, attention_by_hand(model, ids, attend))


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
        compressed(ids[:, : 12 + lag], past_key_values=cache)
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

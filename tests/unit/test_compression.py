"""Spans, policies, fingerprints, equal budgets, recall, and checkpoints of llama2.c, each against the obvious."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lms import TINY_METHODS, random_ids, tiny_adapter, tiny_compressed, tiny_lm
from prose import prose, tiny_pair
from thoughtformer.compression import (
    METHODS,
    Combiner,
    EveryTokens,
    Full,
    Method,
    RemovedFraction,
    Sentinel,
    compress,
)
from thoughtformer.compression.adapter import AdapterConfig
from thoughtformer.compression.method import cached_entries, read_ids
from thoughtformer.compression.policies import Callback, SentenceEnds
from thoughtformer.compression.registry import make_method, method_from, settings_of
from thoughtformer.convert.llama2c import convert_llama2c, load_llama2c, load_llama2c_tokenizer
from thoughtformer.errors import CheckpointError, ConfigError, CorpusError, InputError, OutputError, TokenizerError
from thoughtformer.evaluate.compression import Blocks, mean_entries, sample_blocks, score_method, solve
from thoughtformer.evaluate.planted_facts import plant_facts, score_recall
from thoughtformer.models.fingerprint import fingerprint
from thoughtformer.rules.schedule import Event, RowProgress
from thoughtformer.train.spans import FoldingSettings, fold_row, random_spans


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 300),
    st.floats(0, 0.97),
    st.integers(2, 40),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_random_spans_remove_exactly(num_tokens, removed, longest, k, seed):
    generator = np.random.default_rng(seed)
    num_removed = int(removed * num_tokens)
    most = longest - k
    if most < 1 and num_removed:
        with pytest.raises(ConfigError, match="not shortened"):
            random_spans(num_tokens, num_removed, longest, k, generator)
        return
    if num_removed and num_removed + math.ceil(num_removed / most) * k > num_tokens:
        with pytest.raises(ConfigError, match="would cover"):
            random_spans(num_tokens, num_removed, longest, k, generator)
        return
    spans = random_spans(num_tokens, num_removed, longest, k, generator)
    lengths = [end - start + 1 for start, end in spans]
    assert sum(length - k for length in lengths) == num_removed
    assert all(k < length <= longest for length in lengths)
    assert all(before[1] < after[0] for before, after in zip(spans, spans[1:]))
    assert not spans or (spans[0][0] >= 0 and spans[-1][1] < num_tokens)


@settings(max_examples=100, deadline=None)
@given(st.integers(16, 300), st.integers(1, 3), st.integers(0, 10_000))
def test_folded_rows_count_what_they_say(num_tokens, k, seed):
    """Reached and average fractions against a count of what each token can read; spans never overlap."""
    folded = fold_row([5] * num_tokens, FoldingSettings(), k, np.random.default_rng(seed))
    gone, held = set(), []
    events = {}
    for event in folded.reading.events:
        events.setdefault(event.at, []).append(event)
    entries = 0
    for position in range(num_tokens):
        entries += 1
        held.append(entries)
        for event in events.get(position, []):
            span = set(range(event.start, event.end + 1))
            assert not span & gone
            assert event.end <= position
            gone |= span
            entries -= len(span) - k
    assert folded.achieved == pytest.approx(1 - entries / num_tokens)
    assert folded.average == pytest.approx(1 - sum(held) / sum(range(1, num_tokens + 1)))


def test_removed_fraction_keeps_its_promise():
    """Beyond the tokens that stay raw, a token never reads more than its part of the tokens seen and one span."""
    for removed, span in ((0.3, 8), (0.5, 8), (0.7, 8), (0.9, 16)):
        method = Sentinel(policy=RemovedFraction(removed=removed, span_tokens=span))
        held = cached_entries(method, [5] * 2000)
        for position in range(400, 2000):
            assert held[position] <= max((1 - removed) * (position + 1), 20 + position / span) + span + 1
        assert 1 - sum(held[1000:]) / sum(range(1001, 2001)) == pytest.approx(removed, abs=0.01)


def test_the_default_policy():
    """90% removed, from the 64th token on, 4 first tokens and 16 recent ones raw; nine times smaller at 4,096."""
    method = Sentinel()
    assert (method.policy.first_tokens, method.policy.recent_tokens, method.policy.start_tokens) == (4, 16, 64)
    held = cached_entries(method, [5] * 4097)
    assert held[:64] == list(range(1, 65))
    assert held[64] < 64
    assert 4096 / (held[4096] - 1) >= 9
    row = RowProgress()
    events = read_ids(method, row, [5] * 300).events
    assert events[0].start == 4 and all(event.at - event.end >= 16 for event in events)


def test_every_tokens_and_settings_round_trip():
    method = Sentinel(policy=EveryTokens(span_tokens=10, recent_tokens=3, first_tokens=1, start_tokens=0))
    reading = read_ids(method, RowProgress(), [5] * 40)
    assert [(event.start, event.end, event.at) for event in reading.events] == [(1, 10, 13), (11, 20, 23), (21, 30, 33)]
    for each in (*TINY_METHODS.values(), method):
        assert method_from(each.name, settings_of(each)) == each
    with pytest.raises(ConfigError, match="Did you mean 'local'"):
        method_from("locale", {})
    assert set(METHODS) == {method.name for method in TINY_METHODS.values()}


def test_fingerprints():
    """The same in every precision, another for a changed weight."""
    model = tiny_lm(dtype=torch.float32)
    before = fingerprint(model)
    assert fingerprint(tiny_lm(dtype=torch.float32)) == before
    assert fingerprint(tiny_lm(dtype=torch.float32).to(torch.bfloat16)) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.05
    assert fingerprint(model) != before
    assert fingerprint(tiny_lm("qwen2", dtype=torch.float32)) != before


def blocks(num: int = 2, length: int = 192) -> Blocks:
    return Blocks(ids=random_ids(num, length).tolist(), first_scored=length // 2, num_bytes=1000)


def test_removed_means_the_same_for_every_method_that_can_be_set_by_it():
    model = tiny_lm("llama")
    assert compress(model, "local", removed=0.7).method == METHODS["local"](removed=0.7)
    combiner = compress(model, "combiner", removed=0.7, span_tokens=9).method
    assert combiner == METHODS["combiner"](policy=RemovedFraction(removed=0.7, span_tokens=9))
    adapter = tiny_adapter(model, num_sentinels=2, see_earlier=True)
    with compress(model, "sentinel", adapter=adapter, removed=0.7) as compressed:
        expected = Sentinel(policy=RemovedFraction(removed=0.7), num_sentinels=2, see_earlier=True)
        assert compressed.method == expected
    for name in ("streaming", "h2o", "random"):
        with pytest.raises(ConfigError, match=f"{name} holds a number of entries.*give max_entries"):
            compress(model, name, removed=0.7)


def test_settings_that_a_method_does_not_take():
    model = tiny_lm("llama")
    with pytest.raises(ConfigError, match=r"what kvpress calls so, the fraction that is removed, is removed=0\.5 here"):
        compress(model, "local", compression_ratio=0.5)
    with pytest.raises(ConfigError, match="Did you mean 'max_entries'"):
        compress(model, "streaming", max_entrys=5)
    with pytest.raises(ConfigError, match="Did you mean 'span_tokens'"):
        compress(model, "combiner", removed=0.5, span_token=5)


def test_a_setting_that_is_missing_is_told():
    """And what is defined anew in the same place replaces what it was, while another can't take its name."""

    def define():
        @dataclass(frozen=True, kw_only=True)
        class Needy(Method):
            """Asks for a number."""

            name = "needy"
            number: int

        return Needy

    try:
        define()
        newer = define()
        assert METHODS["needy"].__qualname__ == newer.__qualname__
        with pytest.raises(ConfigError, match=r"needy can't be made of \[\]: .*'number'"):
            compress(tiny_lm("llama"), "needy")
        with pytest.raises(ConfigError, match="needy can't be set to hold a number of entries"):
            solve("needy", 0.5, blocks(), seed=0)
        with pytest.raises(TypeError, match="two methods are called 'needy'"):

            class Other(Method):
                name = "needy"
    finally:
        del METHODS["needy"]


def test_policies_that_need_a_tokenizer():
    model, tokenizer = tiny_pair(plain=True)
    with pytest.raises(ConfigError, match="combiner goes by token ids that only a tokenizer tells"):
        compress(model, "combiner", policy=SentenceEnds(min_tokens=3))
    made = compress(model, "combiner", policy=SentenceEnds(min_tokens=3), tokenizer=tokenizer).method
    assert made.policy == SentenceEnds.for_tokenizer(tokenizer, min_tokens=3)
    assert compress(model, made, tokenizer=tokenizer).method == made, "ids that are given stay"
    none = METHODS["combiner"](policy=SentenceEnds(end_ids=frozenset()))
    assert compress(model, none, tokenizer=tokenizer).method == none, "none are some, too"
    assert method_from("combiner", settings_of(none)) == none


def test_events_take_effect_as_they_are_told():
    seen = []

    class Twice(Full):
        def after(self, row, token_id):
            if row.num_tokens == 6:
                yield Event(0, 1, 5)
                seen.append(row.num_cached)
                yield Event(2, 2, 5)

    row = RowProgress()
    read_ids(Twice(), row, [5] * 6)
    assert seen == [4]
    assert row.num_cached == 3


def test_what_has_no_setting_is_taken_as_it_is():
    assert solve("full", 0.5, blocks(), seed=0) == Full()
    with pytest.raises(ConfigError, match="full removes nothing"):
        compress(tiny_lm("llama"), "full", removed=0.5)


def test_policies_of_one_name_are_refused():
    with pytest.raises(TypeError, match="two policies are called 'removed'"):

        class Other(RemovedFraction):
            name = "removed"

    with pytest.raises(ConfigError, match="a policy of kind 'removed' can't be made of"):
        method_from("combiner", {"policy": {"kind": "removed", "spam": 1}})
    with pytest.raises(ConfigError, match="can't be read back"):
        method_from("combiner", {"policy": {"kind": ["removed"]}})


_ENDS = SentenceEnds(end_ids=frozenset([7]), min_tokens=2, max_tokens=500)


@pytest.mark.parametrize("name", list(METHODS))
def test_what_a_model_decides_is_nobodys_setting(name):
    for setting in METHODS[name].found_settings:
        with pytest.raises(ConfigError, match=f"{name} finds {setting} from the model"):
            make_method(name, {setting: 3})
    with_fields = [field.name for field in fields(METHODS[name])]
    assert set(METHODS[name].found_settings) <= set(with_fields)


def test_methods_that_read_ids_are_set_by_all_blocks(monkeypatch):
    """By the first alone, which here never ends a sentence, the others would hold something else."""
    quiet, busy = [3] * 192, ([3] * 5 + [7]) * 32
    both = Blocks(ids=[quiet, busy], first_scored=96, num_bytes=1000)

    @dataclass(frozen=True, kw_only=True)
    class Ends(Combiner):
        """Holds what a policy by ends leaves, whatever the search asks for."""

        @classmethod
        def at_entries(cls, search):
            method = cls(policy=_ENDS)
            found.append(search.mean_entries(method))
            yield method

    found: list[float] = []
    monkeypatch.setitem(METHODS, "combiner", Ends)
    with pytest.raises(ConfigError, match="combiner can't hold"):
        solve("combiner", 0.9, both, seed=0)
    by_block = [np.mean(cached_entries(Ends(policy=_ENDS), ids)[96:]) for ids in both.ids]
    assert by_block[1] < by_block[0] / 2
    assert found == [np.mean(by_block)]


class Points:
    """A tokenizer of which every eighth token is a full stop."""

    def __len__(self):
        return 64

    def decode(self, ids):
        return "." if ids[0] % 8 == 0 else "word"


@pytest.mark.parametrize("removed", [0.3, 0.5, 0.7])
def test_methods_are_equal_within_one_per_cent(removed):
    seen = np.arange(97, 193).mean()
    for name in set(METHODS) - {"full", "quantised"}:
        method = solve(name, removed, blocks(), seed=0, tokenizer=Points())
        assert mean_entries(method, blocks())[0] == pytest.approx((1 - removed) * seen, rel=0.01), name


def test_what_can_not_be_equal_says_so():
    with pytest.raises(ConfigError, match="combiner can't hold"):
        solve("combiner", 0.9, blocks(), seed=0, span_tokens=4)


@torch.no_grad()
def test_scores_are_the_models_own():
    """The scored tokens' mean loss, by hand from all logits."""
    sample = blocks()
    for name in ("full", "sentinel", "h2o"):
        compressed = tiny_compressed(tiny_lm(), TINY_METHODS[name])
        score = score_method(compressed, sample, removed=0.5, seed=0, batch_size=1)
        ids = torch.tensor(sample.ids)
        logits = compressed(ids, use_cache=False).logits.log_softmax(-1)
        chosen = logits[:, 95:-1].gather(2, ids[:, 96:, None])
        assert score.loss_nats == pytest.approx(-float(chosen.mean()), abs=1e-6)
        assert score.bits_per_byte == pytest.approx(-float(chosen.sum()) / math.log(2) / 1000, abs=1e-6)
        assert score.num_tokens == 192
        compressed.close()


def test_samples_are_disjoint_and_repeatable():
    _, tokenizer = tiny_pair(plain=True)
    texts = [prose(5000, seed=seed) for seed in range(3)]
    settings_ = {"context_tokens": 64, "num_blocks": 4, "seeds": [0, 1, 2]}
    samples = sample_blocks(texts, tokenizer, **settings_)
    again = sample_blocks(texts, tokenizer, **settings_)
    assert samples == again
    every = [tuple(ids) for sample in samples.values() for ids in sample.ids]
    assert len(set(every)) == 12
    for sample in samples.values():
        assert sample.num_bytes == sum(len(tokenizer.decode(ids[32:]).encode()) for ids in sample.ids)
    with pytest.raises(CorpusError, match="blocks"):
        sample_blocks(texts, tokenizer, context_tokens=64, num_blocks=4000, seeds=[0])


@torch.no_grad()
def test_recall_is_what_reading_the_fact_gains():
    model, tokenizer = tiny_pair(plain=True)
    fillers = [tokenizer.encode_document(prose(2000, seed=seed), complete=True).tolist() for seed in range(3)]
    fillers = [[token for token in ids if token != tokenizer.bos_token_id] for ids in fillers]
    texts = plant_facts(fillers, tokenizer, distances=[10, 60], context_tokens=200, num_asked=3)
    assert len(texts) == 6
    for text in texts:
        assert len(text.planted) == len(text.without) == 200
        assert text.planted[-3:] == text.without[-3:]
        end = len(text.planted) - 3 - text.distance
        assert sum(a != b for a, b in zip(text.planted, text.without)) <= 3
        assert text.planted[:end] != text.without[:end] or text.planted == text.without
    with compress(model, "full") as compressed:
        scores = score_recall(compressed, texts, removed=0.0, batch_size=2)
    assert [(score.distance, score.num_texts) for score in scores] == [(10, 3), (60, 3)]
    with compress(model, "truncation", piece_tokens=1) as compressed:
        # Nothing before a token can be read, so nothing is gained.
        for score in score_recall(compressed, texts, removed=1.0):
            assert score.gained_nats == pytest.approx(0, abs=1e-9)
    with pytest.raises(CorpusError, match="fit"):
        plant_facts(fillers, tokenizer, distances=[190], context_tokens=200)


def write_llama2c(path, *, tied: bool, seed: int = 0):
    """A random checkpoint in llama2.c's format; returns its header and tensors."""
    generator = np.random.default_rng(seed)
    width, mlp, layers, heads, kv_heads, vocab, context = 16, 24, 2, 4, 2, 300, 32
    kv = width // heads * kv_heads
    shapes = [
        ("embed", (vocab, width)), ("attention_norm", (layers, width)), ("wq", (layers, width, width)),
        ("wk", (layers, kv, width)), ("wv", (layers, kv, width)), ("wo", (layers, width, width)),
        ("mlp_norm", (layers, width)), ("w1", (layers, mlp, width)), ("w2", (layers, width, mlp)),
        ("w3", (layers, mlp, width)), ("norm", (width,)), ("cos", (context, 2)), ("sin", (context, 2)),
    ]  # fmt: skip
    shapes += [] if tied else [("head", (vocab, width))]
    tensors = {name: generator.normal(0, 0.5, shape).astype("<f4") for name, shape in shapes}
    header = struct.pack("<7i", width, mlp, layers, heads, kv_heads, vocab if tied else -vocab, context)
    path.write_bytes(header + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return tensors


def naive_llama2c(tensors, ids, heads=4, kv_heads=2):
    """The forward pass of llama2.c, position after position: pairs side by side, one vector at a time."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    layers, width = tensors["attention_norm"].shape
    size = width // heads
    keys, values = [[] for _ in range(layers)], [[] for _ in range(layers)]

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def turn(vector, position):
        turned = vector.copy()
        for i in range(0, len(vector), 2):
            angle = position * 10000.0 ** (-(i % size) / size)
            a, b = vector[i], vector[i + 1]
            turned[i], turned[i + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return turned

    logits = []
    for position, token in enumerate(ids):
        x = tensors["embed"][token].copy()
        for layer in range(layers):
            h = norm(x, tensors["attention_norm"][layer])
            query = turn(tensors["wq"][layer] @ h, position)
            keys[layer].append(turn(tensors["wk"][layer] @ h, position))
            values[layer].append(tensors["wv"][layer] @ h)
            out = np.zeros(width)
            for head in range(heads):
                own, shared = slice(head * size, (head + 1) * size), head // (heads // kv_heads)
                part = slice(shared * size, (shared + 1) * size)
                scores = np.array([query[own] @ key[part] / np.sqrt(size) for key in keys[layer]])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[own] = sum(weight * value[part] for weight, value in zip(weights, values[layer]))
            x = x + tensors["wo"][layer] @ out
            h = norm(x, tensors["mlp_norm"][layer])
            gate = tensors["w1"][layer] @ h
            x = x + tensors["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (tensors["w3"][layer] @ h))
        logits.append(tensors.get("head", tensors["embed"]) @ norm(x, tensors["norm"]))
    return torch.tensor(np.stack(logits))


def write_llama2c_tokenizer(path):
    """Three special pieces, 256 bytes, some letters, and words by falling score."""
    letters = [" ", *"abcdehlot", "\u00e9"]
    merged = ["he", "ll", " he", "llo", " hello", "to", " t", " b", "ab"]
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    pieces += [f"~{number}" for number in range(300 - len(pieces))]
    content = struct.pack("<i", 10)
    for number, piece in enumerate(pieces):
        content += struct.pack("<fi", -float(number), len(piece.encode())) + piece.encode()
    path.write_bytes(content)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_llama2c_against_a_naive_reference(tied, tmp_path):
    tensors = write_llama2c(tmp_path / "model.bin", tied=tied)
    ids = [1, 7, 200, 45, 45, 9, 299, 12, 3]
    logits = load_llama2c(tmp_path / "model.bin").double()(torch.tensor([ids])).logits[0]
    # transformers computes rotations and norms in float32.
    torch.testing.assert_close(logits, naive_llama2c(tensors, ids), rtol=0, atol=2e-4)

    write_llama2c_tokenizer(tmp_path / "tok.bin")
    convert_llama2c(tmp_path / "model.bin", tmp_path / "tok.bin", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()
    assert torch.equal(model(torch.tensor([ids])).logits[0], logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello to ab\u00e9z").input_ids) == [
        "<s>", " hello", " ", "to", " ", "ab", "\u00e9", "<0x7A>",
    ]  # fmt: skip
    assert (
        tokenizer.decode(tokenizer("hello to ab\u00e9z\n").input_ids, skip_special_tokens=True)
        == "hello to ab\u00e9z\n"
    )
    with pytest.raises(OutputError, match="exists"):
        convert_llama2c(tmp_path / "model.bin", tmp_path / "tok.bin", tmp_path / "out")


def test_damaged_llama2c_files_are_refused(tmp_path):
    write_llama2c(tmp_path / "model.bin", tied=True)
    write_llama2c_tokenizer(tmp_path / "tok.bin")
    for name, change in (("short", lambda c: c[:-4]), ("long", lambda c: c + b"1234"), ("tiny", lambda c: c[:10])):
        (tmp_path / name).write_bytes(change((tmp_path / "model.bin").read_bytes()))
        with pytest.raises(CheckpointError, match=str(tmp_path / name)):
            load_llama2c(tmp_path / name)
    (tmp_path / "t").write_bytes((tmp_path / "tok.bin").read_bytes()[:-3])
    with pytest.raises(TokenizerError, match="truncated"):
        load_llama2c_tokenizer(tmp_path / "t")
    with pytest.raises(CheckpointError, match="can't read"):
        load_llama2c(tmp_path / "none")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RemovedFraction(removed="0.5"), "removed='0.5' is a str; give float"),
        (lambda: EveryTokens(span_tokens=True), "span_tokens=True is a bool; give int"),
        (lambda: EveryTokens(span_tokens=16.0), "span_tokens=16.0 is a float; give int"),
        (lambda: METHODS["scattered"](seed=None), "seed=None is a NoneType; give int"),
        (lambda: METHODS["local"](removed="half"), "removed='half' is a str; give float"),
        (lambda: METHODS["h2o"](max_entries="64"), "max_entries='64' is a str; give int"),
        (lambda: METHODS["streaming"](max_entries=None), "max_entries=None is a NoneType; give int"),
        (lambda: METHODS["combiner"](policy="every"), "policy='every' is a str; give Policy"),
        (lambda: Sentinel(see_earlier=1), "see_earlier=1 is a int; give bool"),
        (lambda: SentenceEnds(end_ids=3), r"end_ids=3 is a int; give frozenset\[int\]"),
        (lambda: SentenceEnds(end_ids=["."]), r"give frozenset\[int\]"),
        (lambda: Callback(choose=3), "choose=3 is a int; give a function"),
        (lambda: AdapterConfig(lora_dropout="no"), "lora_dropout='no' is a str; give float"),
        (lambda: compress(tiny_lm("llama"), 3), "method=3 is a int; give a Method or one of attention_matching, "),
        (lambda: compress(tiny_lm("llama"), "local", removed="0.5"), "removed='0.5' is a str"),
        (lambda: compress(tiny_lm("llama"), "local", prefill_tokens="3"), "prefill_tokens='3' must be a whole number"),
    ],
)
def test_settings_of_wrong_types_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_settings_that_follow_from_others_are_taken():
    assert SentenceEnds(end_ids=[1, 2]).end_ids == frozenset((1, 2))
    assert RemovedFraction(removed=0).removed == 0
    assert Callback(choose=lambda row, available: None).name == "callback"


def test_one_text_is_a_batch_of_one():
    model = compress(tiny_lm("llama"), "local")
    with pytest.raises(InputError, match=r"\(batch, seq\)"):
        model(torch.arange(5))


def test_replacing_settings_is_checked():
    with pytest.raises(ConfigError, match="span_tokens"):
        replace(RemovedFraction(), span_tokens=1)

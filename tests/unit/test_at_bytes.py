"""Quality by bytes: lines are measured once, differences are paired text by text, presses are read as they decode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from lms import tiny_lm
from thoughtformer.bench import at_bytes as module
from thoughtformer.bench.at_bytes import at_bytes, full_bytes, settings_at, summary
from thoughtformer.bench.peers.kvpress_worker import masks_by_kind
from thoughtformer.bench.quality import QualityOptions, cases_for
from thoughtformer.bench.records import Record, Spread
from thoughtformer.compression.registry import make_method
from thoughtformer.errors import InputError
from thoughtformer.evaluate.compression import Blocks
from thoughtformer.models.backbone import backbone_of
from thoughtformer.models.transformers_api import CACHE_NAME

TEXT = " ".join(f"The {noun} of house number {number} was painted on day {number}." for number in range(90)
                for noun in ("door", "roof", "fence"))  # fmt: skip


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_peer", lambda name: None)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return QualityOptions(
        data=[str(tmp_path / "text.txt")],
        models=("tiny-gpt",),
        methods=("local", "quantised"),
        lengths=(192,),
        num_texts=2,
        tasks=("planted_fact",),
        num_task_texts=2,
    )


def test_a_run_goes_on_where_it_was_interrupted(options):
    """Behind any line, with the same figures."""
    whole = list(at_bytes(options))
    assert {record.peer for record in whole} > {"full", "8 bits", "local 1/4", "kvpress"}
    assert not any("streaming" in record.peer for record in whole)
    assert list(at_bytes(replace(options, earlier=whole))) == []
    middle = len(whole) // 2
    rest = list(at_bytes(replace(options, earlier=whole[:middle])))
    assert [replace(record, metrics={}) for record in rest] == [
        replace(record, metrics={}) for record in whole[middle:]
    ]
    for ours, first in zip(rest, whole[middle:], strict=True):
        for name, spread in ours.metrics.items():
            assert spread.values == pytest.approx(first.metrics[name].values)


def test_a_summary_is_beside_full_attention(options):
    found = {record.peer: record.metrics for record in summary(at_bytes(options))}
    assert found["full"]["above_full_bits_per_byte"].median == 0
    assert 1 < found["full"]["stored_of_full"].median < 1.2  # as of 2 bytes a number, with what is known of entries
    assert found["full"]["stored_of_full"].median == found["full"]["resident_of_full"].median
    sizes = [found[name]["stored_of_full"].median for name in ("full", "8 bits", "4 bits", "2 bits")]
    assert sizes == sorted(sizes, reverse=True)


def line(peer, texts, first, **metrics):
    work = {"model": "m", "dtype": "float32", "tokens": 64, "texts": texts, "first": first, "number": 2}
    values = {name: Spread.of(of, keep=True) for name, of in metrics.items()}
    return Record(theme="quality", case="at_bytes", peer=peer, workload=work, metrics=values)


def sizes(*of):
    return {f"{kind}_of_full": of for kind in ("stored", "resident", "read")}


def test_differences_are_paired_text_by_text():
    lines = [
        line("full", "text", 0, bits_per_byte=[1.0, 3.0], **sizes(1, 1)),
        line("full", "text", 4, bits_per_byte=[5.0, 9.0], **sizes(1, 1)),
        line("full", "planted_fact", 0, right=[1.0, 0.0], loss_nats=[0, 0]),
        line("a", "text", 4, bits_per_byte=[5.2, 9.4], **sizes(0.25, 0.5)),
        line("a", "planted_fact", 0, right=[0.0, 1.0], loss_nats=[0, 0]),
        line("b", "planted_fact", 0, right=[1.0, 1.0], loss_nats=[0, 0]),
    ]
    full, a, b = summary(lines)
    assert (full.peer, a.peer, b.peer) == ("full", "a", "b")
    above = a.metrics["above_full_bits_per_byte"]
    assert (above.median, above.runs) == (pytest.approx(0.3), 2)
    assert above.high - above.median == pytest.approx(0.1)  # of two differences that are 0.2 apart
    assert a.metrics["read_of_full"].median == 0.375
    assert a.metrics["planted_fact_of_full"].median == 0
    assert b.metrics["planted_fact_of_full"].median == 1
    assert "above_full_bits_per_byte" not in b.metrics


def test_a_setting_that_changed_is_told_apart():
    old = replace(line("a", "text", 0, bits_per_byte=[7.0], **sizes(1)), settings={"bits": 8})
    new = replace(line("a", "text", 4, bits_per_byte=[5.0], **sizes(1)), settings={"bits": 4})
    full = [line("full", "text", first, bits_per_byte=[4.0], **sizes(1)) for first in (0, 4)]
    found = {record.peer: record for record in summary([*full, old, new])}
    assert found["a"].metrics["above_full_bits_per_byte"].median == 1
    assert old.name != new.name


@pytest.mark.parametrize("num_tokens", [128, 2048, 8192])
def test_all_settings_can_be_made(num_tokens):
    settings = settings_at(num_tokens)
    assert next(iter(settings)) == "full"
    for chosen in settings.values():
        values = dict(chosen)
        make_method(values.pop("method"), values)


def test_full_bytes_are_those_of_windows_too():
    model = tiny_lm("gemma3_text")
    backbone = backbone_of(model)
    blocks = Blocks(ids=[list(range(40))], first_scored=30, num_bytes=1)
    windows = {window: len(layers) for window, layers in ((group.window, group.layers) for group in backbone.groups)}
    entries = sum(
        number * sum(before if window is None else min(before, window - 1) for before in range(30, 40)) / 10
        for window, number in windows.items()
    )
    assert full_bytes(backbone, blocks) == entries * 2 * 2 * backbone.num_kv_heads * backbone.head_dim


def test_presses_are_read_at_once_as_they_decode():
    """Pruned layers with windows: for several tokens transformers makes masks of positions, one by one it does not."""
    model = tiny_lm("gemma3_text").double()
    ids, first = torch.randint(model.config.vocab_size, (1, 40)), 20
    kept = torch.tensor([0, 1, 5, 11, 17, 18, 19])

    def pruned():
        cache = DynamicCache()
        model(ids[:, :first], **{CACHE_NAME: cache})
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        return cache

    cache = pruned()
    mask = masks_by_kind(model.config, [len(kept)] * len(cache.layers), ids.shape[1] - first)
    positions = torch.arange(first, ids.shape[1])[None]
    at_once = model(ids[:, first:], **{CACHE_NAME: cache}, position_ids=positions, attention_mask=mask).logits
    cache = pruned()
    for place in range(first, ids.shape[1]):
        where = torch.tensor([[place]])
        step = model(ids[:, place : place + 1], **{CACHE_NAME: cache}, position_ids=where).logits
        torch.testing.assert_close(at_once[:, place - first], step[:, 0], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ("tiny-gpt", "tiny-gpthf")}, "one --model"),
        ({"tasks": ("planted_facts",)}, "planted_fact"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"lengths": (10**6,)}, "blocks of 1000000 tokens"),
    ],
)
def test_what_cant_be_measured_is_told(options, settings, message):
    with pytest.raises(Exception, match=message) as caught:
        list(at_bytes(replace(options, **settings)))
    assert isinstance(caught.value, InputError)


def test_other_models_are_meant_for_it(tmp_path):
    assert "at_bytes" not in cases_for(None)
    assert cases_for(["tiny-gpt"]) == cases_for(None)
    tiny_lm("llama").save_pretrained(tmp_path)
    assert cases_for([str(tmp_path)]) == ["at_bytes"]

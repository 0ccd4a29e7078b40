"""The benchmark harness: synthetic caches are those of real texts, lines survive a round trip, figures are what ran."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.report.claims import CLAIMS, judge, latest
from benchmarks.report.page import write_report
from benchmarks.report.tables import claims_table, renew, renewed
from conftest import tiny_model
from thoughtformer.bench.flops import generation_flops, regular_ids
from thoughtformer.bench.paper import exact_incremental_flops, recomputing_flops
from thoughtformer.bench.peers.process import PeerError, PeerProcess
from thoughtformer.bench.records import (
    Record,
    Spread,
    append_records,
    command_line,
    environment,
    read_records,
)
from thoughtformer.bench.synthetic import filled_cache, filled_dynamic_cache
from thoughtformer.bench.timing import interleaved, memory_read_rate
from thoughtformer.errors import InputError
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM


@pytest.mark.parametrize("context", [7, 25, 60, 76])
def test_a_filled_cache_is_that_of_a_text_read(visibility, context):
    """The same lengths, counters and entries, and so the same bytes and the same masks."""
    model = tiny_model(visibility)
    filled = filled_cache(model, num_rows=2, context=context)
    read = model.new_cache(2)
    read.reserve(context)
    ids = torch.tensor([regular_ids(context, sentence_tokens=25, sentence_end_token_id=1)] * 2)
    with torch.no_grad():
        model(ids, cache=read)
    assert filled.num_bytes() == read.num_bytes()
    assert filled.get_seq_length() == read.get_seq_length() == context
    for name in ("document", "sentence", "offset", "position"):
        assert torch.equal(getattr(filled.counters, name), getattr(read.counters, name))
    for ours, theirs in zip(filled.stages, read.stages, strict=True):
        assert torch.equal(ours.lengths, theirs.lengths)
        assert torch.equal(ours.entries[:, :, : ours.longest], theirs.entries[:, :, : theirs.longest])


@pytest.mark.parametrize("changes", [{"summaries_per_sentence": 3}, {"recent_sentences": 1}], ids=str)
def test_a_filled_cache_of_an_hourglass(changes):
    model = tiny_model("hourglass", **changes)
    filled, read = filled_cache(model, num_rows=1, context=60), model.new_cache(1)
    ids = torch.tensor([regular_ids(60, sentence_tokens=25, sentence_end_token_id=1)])
    with torch.no_grad():
        model(ids, cache=read)
    for ours, theirs in zip(filled.stages, read.stages, strict=True):
        assert torch.equal(ours.entries[:, :, : ours.longest], theirs.entries[:, :, : theirs.longest])


def test_a_filled_dynamic_cache_holds_the_context():
    model = tiny_model("causal", num_encoder_layers=0)
    cache = filled_dynamic_cache(model, num_rows=3, context=11)
    assert cache.get_seq_length() == 11
    assert len(cache.layers) == model.config.num_body_layers


@pytest.mark.parametrize(("prompt", "new"), [(100, 30), (20, 60), (130, 5)])
def test_the_closed_form_is_the_fast_model_counted(prompt, new):
    """To three per cent: the counted plan pads sentences of unequal length, and adds nothing else."""
    config = GPTHFConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_encoder_layers=2,
        num_body_layers=1,
        body_visibility="fast",
    )
    ids = regular_ids(prompt + new, sentence_tokens=25, sentence_end_token_id=1)
    counted = generation_flops(GPTHFForCausalLM(config).eval(), ids[:prompt], ids[prompt:])
    assert counted == pytest.approx(exact_incremental_flops(config, prompt, new), rel=0.03)


def test_recomputing_is_counted_forwards():
    config = GPTHFConfig(
        vocab_size=64, hidden_size=64, num_encoder_layers=0, num_body_layers=2, body_visibility="causal"
    )
    model = GPTHFForCausalLM(config).eval()
    ids = regular_ids(14, sentence_tokens=25, sentence_end_token_id=1)
    forwards = sum(generation_flops(model, ids[:length], ids[:1]) for length in (10, 11, 12))
    assert recomputing_flops(config, 10, 3) == forwards


def record(peer: str = "gpt", **changes: object) -> Record:
    """A line as a run writes it."""
    line = Record(
        theme="speed",
        case="prefill",
        peer=peer,
        workload={"batch": 1, "context": 4096, "size": "full"},
        metrics={"seconds": Spread.of([1.0, 2.0, 4.0])},
        environment={"run": "one"},
        command="thoughtformer bench speed",
    )
    return replace(line, **changes)


def seconds(*values: float) -> dict[str, Spread]:
    """Metrics of a timed peer."""
    return {"seconds": Spread.of(values)}


def test_lines_survive_the_file(tmp_path):
    lines = [record(), record("llama.cpp", metrics={}, skipped="not installed"), record(environment=environment())]
    append_records(tmp_path / "new" / "a.jsonl", lines[:1])
    append_records(tmp_path / "new" / "a.jsonl", lines[1:])
    assert read_records([tmp_path / "new"]) == lines
    assert lines[2].environment["versions"]["torch"] == torch.__version__
    assert lines[2].environment["threads"] == torch.get_num_threads()


def test_the_command_leaves_out_where_lines_go(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/some/where/thoughtformer", "bench", "speed", "--out", "/a/b.jsonl", "--data", "/a/b/c.txt"]
    )
    assert command_line() == "thoughtformer bench speed --data b/c.txt"


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"theme": "speed"}', record().to_json()[:-5]])
def test_a_broken_line_is_told(tmp_path, line):
    (tmp_path / "broken.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="not a line of"):
        read_records([tmp_path / "broken.jsonl"])


def test_rounds_are_interleaved_and_warm_ups_dont_count():
    order, values = [], iter(range(100))

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"value": float(next(values))}

    figures = interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, repeats=3, warmups=1)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert figures["a"]["value"] == Spread.of([2, 5, 6])
    assert figures["b"]["value"] == Spread(median=4, low=3, high=7, runs=3)


def test_memory_is_read_at_a_plausible_rate():
    assert 1e8 < memory_read_rate(mebibytes=8, repeats=1) < 1e13


def test_a_claim_is_a_ratio_within_one_run():
    ours = record("gpthf 4+8", metrics=seconds(1.0, 1.25, 2.0))
    gpt = record(metrics=seconds(4.0, 5.0, 6.0))
    (verdict,) = judge([gpt, ours])
    assert verdict.value == Spread(median=4.0, low=2.0, high=6.0, runs=3)
    assert verdict.is_met
    assert (verdict.shown(), verdict.goal()) == ("4.00x [2.00x, 6.00x]", "≥ 3.50x")
    assert judge([record(metrics=seconds(4.0), environment={"run": "two"}), ours]) == []
    assert judge([record(metrics=seconds(4.0), workload={**gpt.workload, "size": "toy"}), ours]) == []


def test_runs_count_by_when_they_began_not_by_their_place():
    late = record(metrics=seconds(9.0), environment={"run": "2026-02"})
    early = record(metrics=seconds(1.0), environment={"run": "2026-01"})
    other = record("llama.cpp", environment={"run": "2026-01"})
    assert latest([late, early, other]) == [late]


def test_a_claim_that_was_not_measured_is_shown():
    table = claims_table([])
    assert table.count("not measured") == len(CLAIMS)


def test_the_last_run_that_measured_a_claim_counts():
    first = [record(metrics=seconds(4.0)), record("gpthf 4+8", metrics=seconds(1.0))]
    later = [replace(line, environment={"run": "two"}) for line in first]
    later[0] = replace(later[0], metrics=seconds(3.0))
    (verdict,) = judge([*first, *later, record(environment={"run": "three"})])
    assert verdict.value.median == 3.0
    assert not verdict.is_met


def test_the_share_of_the_memorys_limit():
    workload = {"size": "full", "weight_bytes": 100}
    memory = record(
        "memory", case="batch1", workload=workload, metrics={"bytes_per_second": Spread.of([4000.0, 5000.0, 6250.0])}
    )
    gpt = record("gpt", case="batch1", workload=workload, metrics={"tokens_per_second": Spread.of([40.0])})
    (verdict,) = judge([memory, gpt])
    assert verdict.value.median == pytest.approx(0.8)
    assert verdict.value.low == pytest.approx(0.64)  # the slowest run by the fastest memory
    assert (verdict.shown(), verdict.is_met) == ("80% [64%, 100%]", True)


def test_every_claim_can_be_judged_and_names_a_case():
    from thoughtformer.bench import memory, paper, speed

    cases = {"speed": speed.CASES, "memory": memory.CASES, "flops": paper.CASES}
    assert all(claim.case in cases[claim.theme] for claim in CLAIMS)
    assert judge([]) == []


def test_tables_are_renewed_between_their_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:claims -->\nold\n<!-- bench:end -->\nbetween\n")
    lines = [record(metrics=seconds(3.0)), record("gpthf 4+8", metrics=seconds(1.0))]
    renew(readme, lines)
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:claims -->\n| |")
    assert text.endswith("<!-- bench:end -->\nbetween\n")
    assert "old" not in text
    assert "3.00x | ≥ 3.50x, **missed** |" in text
    assert renewed(text, lines) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marks", "no lines"),
        ("<!-- bench:clams -->\n<!-- bench:end -->", "Did you mean 'claims'"),
        ("<!-- bench:case speed decode -->\n<!-- bench:end -->", "nothing of speed, decode"),
        ("<!-- bench:case speed -->\n<!-- bench:end -->", "missing a required argument"),
        ("<!-- bench:claims -->\nprose\n<!-- bench:claims -->\n<!-- bench:end -->", "before the next mark"),
    ],
)
def test_marks_that_cant_be_filled_are_told(text, message):
    with pytest.raises(InputError, match=message):
        renewed(text, [record()])


def quality(peer: str, removed: float, *above: float) -> Record:
    """A method's line of the compression case."""
    metrics = {
        "bits_per_byte": Spread.of([1.5 + value for value in above]),
        "above_full_bits_per_byte": Spread.of(above),
        "kv_bytes": Spread.of([2e6 * (1 - removed)]),
    }
    workload = {"data": ["books/valid.txt"], "removed": removed}
    return record(peer, theme="quality", case="compression", workload=workload, metrics=metrics)


def test_a_compression_table_is_in_thousandths_above_full():
    lines = [quality("full", 0.0, 0.0), quality("local", 0.5, 0.001, 0.002, 0.004), quality("h2o", 0.9, 0.01)]
    mark = "<!-- bench:compression books/valid.txt{} -->\n{}<!-- bench:end -->"
    text = renewed(mark.format("", ""), lines)
    assert "| full attention 1.500 [1.500, 1.500] | 50% | 90% | MB held at 90% |" in text
    assert "| local | +2.0 [+1.0, +4.0] |  |" in text
    assert "| h2o |  | +10.0 [+10.0, +10.0] | 0.20 |" in text
    assert "h2o" not in renewed(mark.format(" local", ""), lines)


def test_a_case_table_keeps_the_last_run():
    lines = [record(metrics=seconds(2.0)), record(metrics=seconds(0.5), environment={"run": "two"})]
    text = renewed("<!-- bench:case speed prefill -->\n<!-- bench:end -->", lines)
    assert "| gpt | 500.0 ms |" in text
    assert "2.00 s" not in text


def test_a_report_is_one_page_with_its_pictures(tmp_path):
    lines = [
        record(peer, workload={"batch": 1, "context": context, "size": "full"}, metrics=seconds(context / speed))
        for peer, speed in (("gpt", 100.0), ("gpthf 4+8", 400.0))
        for context in (1024, 4096)
    ]
    lines.append(record("<llama>", metrics={}, skipped="not <installed>"))
    page, *pictures = write_report(lines, tmp_path / "report")
    text = page.read_text()
    assert [picture.name for picture in pictures] == ["prefill-light.svg", "prefill-dark.svg"]
    for picture in pictures:
        drawn = picture.read_text(encoding="utf-8")
        assert ">gpt</text>" in drawn
        assert ">gpthf 4+8</text>" in drawn
    assert picture.read_bytes() == write_report(lines, tmp_path / "again")[-1].read_bytes(), (
        "the same for the same figures"
    )
    assert text.count("<img") == 1
    assert text.count("data:image/svg+xml;base64,") == 2, "for light and dark"
    assert "skipped: not &lt;installed&gt;" in text
    assert "<llama>" not in text
    assert "4.00x" in text
    assert not list((tmp_path / "report").glob(".*"))


def test_claims_table_shows_the_worst_of_the_pairs():
    def pair(prompt: int, flops: float) -> Record:
        return record(
            "gpthf 16+8 fast",
            theme="flops",
            case="pairs",
            workload={"prompt": prompt, "new": 100, "size": "full"},
            metrics={"flops": Spread.of([flops]), "exact_incremental_flops": Spread.of([100.0])},
        )

    table = claims_table(judge([pair(100, 101.0), pair(250, 102.0)]))
    assert table.count("FLOPs of 2 (prompt, new) pairs") == 1
    assert "2.0% | ≤ 5.0% |" in table


WORKER = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    if question["ask"] == "fail":
        raise ValueError("out of beans")
    print(json.dumps({"heard": question["ask"]}), flush=True)
"""


def test_a_peer_answers_and_its_failure_is_told(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with PeerProcess(Path(sys.executable), str(worker), threads=1) as peer:
        assert peer.ask(ask="one") == {"heard": "one"}
        with pytest.raises(PeerError, match="out of beans"):
            peer.ask(ask="fail")

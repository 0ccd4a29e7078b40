"""The study's runner: rows once each, picked up again, scored alike; and its figures by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from benchmarks.report.study_plots import PROFILED, pictures_of_study
from benchmarks.report.study_tables import finalists_table, learning_rates_table, profile_table, study_table
from benchmarks.study import rows as study_rows
from benchmarks.study import run as study_run
from benchmarks.study.__main__ import app
from benchmarks.study.rows import BEST, GROUPS, Row, rows_of
from benchmarks.study.run import StudySettings, run_rows
from benchmarks.study.speed import StudySpeed
from prose import prose
from thoughtformer.bench.records import Record, Spread, read_records
from thoughtformer.errors import ConfigError, CorpusError, InputError, OutputError
from thoughtformer.evaluate import DocumentBits, windows
from thoughtformer.evaluate.profile import BINS, EDGES, LossProfile, Places, sentence_places
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
from thoughtformer.models.loading import load_tokenizer
from thoughtformer.recipes.tiny import tiny_gpthf


def test_every_row_is_a_valid_training():
    """All variants at all sizes, and every group's rows, make recipes; names are unlike."""
    of_groups = {row for group in GROUPS for row in rows_of(group)}
    variants = [Row(variant=variant, size=size) for variant in study_rows.VARIANTS for size in study_rows.SIZES]
    rows = [*of_groups.union(variants)]
    assert {row.recipe().name for row in rows} == {row.name for row in rows}
    assert len({row.name for row in rows}) == len(rows)
    with pytest.raises(ConfigError, match="Did you mean 'hybrid-2-4'"):
        Row(variant="hybrid-2-5")


def test_best_is_the_default_recipe():
    """Their shapes differ in width alone, so what the study says of one holds for the other's architecture."""
    default = tiny_gpthf().model
    widths = {name: getattr(default, name) for name in study_rows.SIZES["1m"]}
    assert replace(Row(variant=BEST).recipe().model, **widths) == default


def test_drawn_profiles_are_of_known_variants():
    """Pictures name architectures a layer below the study, which can't be asked there."""
    assert set(PROFILED) <= set(study_rows.VARIANTS)


@pytest.mark.parametrize("size", list(study_rows.SIZES))
def test_variants_have_equal_parameters(size):
    """To 4%: some switches can't do without a few more."""
    counts = {}
    for name in study_rows.VARIANTS:
        config = Row(variant=name, size=size).recipe().model_config(vocab_size=8192, start=0, end=1, padding=2)
        with torch.device("meta"):
            counts[name] = sum(parameter.numel() for parameter in GPTHFForCausalLM(config).parameters())
    assert all(abs(count / counts["gpt"] - 1) < 0.04 for count in counts.values()), counts


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two tiny architectures on a page of text."""
    monkeypatch.setenv("THOUGHTFORMER_CACHE", str(tmp_path / "cache"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    monkeypatch.setitem(study_rows.SIZES, "1m", small)
    for name in ("gpt", "hourglass-2-2-2"):
        variant = study_rows.VARIANTS[name]
        short = dict(variant.run) | {"row_tokens": 64, "rows_per_batch": 2, "max_steps": 4, "save_every_steps": 2}
        monkeypatch.setitem(study_rows.VARIANTS, name, replace(variant, run=short))
    monkeypatch.setattr(study_rows, "MEGABYTE", 5000)
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(prose(6000, seed=len(name)))
    return StudySettings(
        data=[str(tmp_path / "train.txt")],
        valid={"books": str(tmp_path / "valid.txt"), "wikipedia": str(tmp_path / "valid.txt")},
        out=tmp_path / "study.jsonl",
        work=tmp_path / "work",
        valid_bytes=800,
        document_bytes=700,
    )


def test_rows_run_once_and_in_parts(study):
    rows = [Row(variant="gpt", megabytes=1), Row(variant="hourglass-2-2-2", megabytes=1)]
    assert run_rows(rows, study, limit=1) == 1
    with FileLock(study.work / f"{rows[1].name}.lock"):
        assert run_rows(rows, study) == 0, "the second is in work elsewhere, the first done"
    assert run_rows(rows, study) == 1
    assert run_rows(rows, study) == 0
    records = read_records([study.out])
    assert [record.peer for record in records] == ["gpt", "hourglass-2-2-2"]
    for record in records:
        assert record.settings["data"] == ["train.txt"]
        assert str(study.work) not in record.to_json()
        assert record.metrics["tokens"].median == 4 * 4 * 64
        assert 1 < record.metrics["books_bits_per_byte"].median < 20
        counts = record.settings["books"]
        assert counts["bytes"] == 700
    # The hourglass's body runs at sentence ends alone; at this width most of the work is the head's.
    assert records[1].metrics["training_flops"].median < records[0].metrics["training_flops"].median
    lines = study_table(records, "1m", "1", "0.004")
    assert {line[0] for line in lines[1:]} == {"gpt", "hourglass-2-2-2"}
    assert len(profile_table(records, "by_earlier", "gpt,hourglass-2-2-2", "books", "1m", "1", "0.004")) == 3
    assert learning_rates_table(records, "1m", "1")[0] == ["", "0.004"]
    with pytest.raises(InputError, match="no study rows of size 3m"):
        study_table(records, "3m", "1", "0.004")


def test_interrupted_row_goes_on_from_its_checkpoint(study, monkeypatch):
    """As an uninterrupted one would have: the same figures, to the last digit."""
    row = Row(variant="hourglass-2-2-2", megabytes=1)
    assert run_rows([row], study) == 1
    whole = json.loads(study.out.read_text())["metrics"]["books_bits_per_byte"]["median"]
    folder = study.work / row.name
    for name in ("model.safetensors", "training.json", "config.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-4")
    study.out.unlink()
    assert (folder / "checkpoint-2").is_dir()
    assert run_rows([row], study) == 1
    assert json.loads(study.out.read_text())["metrics"]["books_bits_per_byte"]["median"] == whole


def test_a_row_of_another_run_is_no_row_of_this(study):
    row = Row(variant="gpt", megabytes=1)
    assert run_rows([row], study) == 1
    with pytest.raises(ConfigError, match=r"has row gpt_1m.*books: \{'bytes': 700, .*\}, now \{'bytes': 600, "):
        run_rows([row], replace(study, document_bytes=600, valid_bytes=600))
    record = json.loads(study.out.read_text())
    record["settings"]["recipe"]["warmup_fraction"] = 0.5
    study.out.write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match=r"warmup_fraction: 0\.5, now 0\.03"):
        run_rows([row], study)


def test_other_texts_of_the_same_names_are_other_texts(study, tmp_path):
    """As many bytes in files called alike, but not the same."""
    row = Row(variant="gpt", megabytes=1)
    assert run_rows([row], study) == 1
    (tmp_path / "other").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "other" / f"{name}.txt").write_text(prose(6000, seed=77))
    other = str(tmp_path / "other" / "train.txt")
    with pytest.raises(ConfigError, match="data_digest"):
        run_rows([row], replace(study, data=[other]))
    with pytest.raises(ConfigError, match="books"):
        run_rows([row], replace(study, valid=study.valid | {"books": str(tmp_path / "other" / "valid.txt")}))
    record = json.loads(study.out.read_text())  # rows of older versions know names and sizes alone
    del record["settings"]["data_digest"], record["settings"]["books"]["digest"]
    study.out.write_text(json.dumps(record) + "\n")
    assert run_rows([row], replace(study, data=[other])) == 0


def test_a_trained_row_is_only_scored(study, monkeypatch):
    """Also if its checkpoints were removed, to make room."""
    row = Row(variant="gpt", megabytes=1)
    assert run_rows([row], study) == 1
    first = json.loads(study.out.read_text())
    study.out.unlink()
    for checkpoint in (study.work / row.name).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    weights = study.work / row.name / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert run_rows([row], study) == 1
    assert weights.stat().st_mtime_ns == written
    assert json.loads(study.out.read_text())["metrics"] == first["metrics"]


def test_two_runners_of_one_file_write_a_row_once(study, monkeypatch):
    """Though each works in a folder of its own."""
    row = Row(variant="gpt", megabytes=1)
    train = study_run.train

    def train_beside(*arguments, **settings):
        monkeypatch.setattr("benchmarks.study.run.train", train)
        assert run_rows([row], replace(study, work=study.work.with_name("theirs"))) == 1
        return train(*arguments, **settings)

    monkeypatch.setattr("benchmarks.study.run.train", train_beside)
    assert run_rows([row], study) == 0
    assert len(read_records([study.out])) == 1


def test_a_row_says_by_which_commits_it_was_trained(study, monkeypatch):
    said = []
    row = Row(variant="gpt", megabytes=1)
    for commit in ("aaaa+changes", "bbbb"):
        monkeypatch.setattr("benchmarks.study.run.environment", lambda commit=commit: {"commit": commit})
        study.out.unlink(missing_ok=True)
        assert run_rows([row], replace(study, on_progress=said.append)) == 1
    assert json.loads(study.out.read_text())["environment"]["commit"] == "bbbb, begun by aaaa+changes"
    assert len([line for line in said if "uncommitted changes" in line]) == 2


def test_the_command_asks_for_rows(study, run, monkeypatch):
    """Which, of which texts, and how many; each of a user's mistakes is told."""
    monkeypatch.setitem(GROUPS, "pair", lambda: [Row(variant=n, megabytes=1) for n in ("gpt", "hourglass-2-2-2")])
    monkeypatch.setattr("benchmarks.study.rows.GROUPS", GROUPS)
    texts = ["--data", study.data[0], "--valid", f"books={study.valid['books']}"]
    texts += ["--out", str(study.out), "--work", str(study.work)]
    code, _, said = run("run", "pair", *texts, "--limit", "1", command=app)
    assert code == 0
    assert "1 rows added, of 2 asked for in pair" in " ".join(said.split())
    assert run("run", "pair", *texts, "--only", "hourglass-2-2-2", command=app)[0] == 0
    assert [record.peer for record in read_records([study.out])] == ["gpt", "hourglass-2-2-2"]
    for changed, message in (
        (["pear", *texts], "Did you mean 'pair'"),
        (["pair", *texts, "--only", "hourglass-2-2"], "has no such row"),
        (["pair", *texts, "--valid", "books=other.txt"], "names two texts 'books'"),
        (["pair", *texts, "--valid", "books"], "write NAME=FILE"),
        (["pair", *texts, "--valid", "recipe=other.txt"], "can't be called 'recipe'"),
    ):
        code, _, said = run("run", *changed, command=app)
        assert code != 0
        assert message in " ".join(said.split())


def test_a_run_with_checkpoints_is_never_removed(study, monkeypatch):
    """A full disk, say, ends the runner, and the checkpoints stay."""
    row = Row(variant="gpt", megabytes=1)
    assert run_rows([row], study) == 1
    study.out.unlink()

    def fails(*arguments, **settings):
        assert settings.get("resume")
        assert not settings.get("overwrite")
        raise OutputError("no space left")

    monkeypatch.setattr("benchmarks.study.run.train", fails)
    with pytest.raises(OutputError, match="no space"):
        run_rows([row], study)
    assert (study.work / row.name / "checkpoint-4").is_dir()


def test_held_out_text_is_looked_for_first(study, monkeypatch):
    monkeypatch.setattr("benchmarks.study.run.train", None)
    with pytest.raises(CorpusError, match="missing"):
        run_rows([Row(variant="gpt", megabytes=1)], replace(study, valid={"books": "missing.txt"}))


def test_a_row_is_not_named_after_more_text_than_there_is(study, monkeypatch):
    monkeypatch.setattr("benchmarks.study.run.train", None)
    with pytest.raises(CorpusError, match=r"gpt_1m_2mb\S+ needs 10,000 bytes .*give 6,\d+: give more"):
        run_rows([Row(variant="gpt", megabytes=2)], study)
    assert not study.out.exists()


def test_tables_of_what_was_measured(study):
    """One text alone, several rates; what isn't there is told."""
    only = replace(study, valid={"poems": study.valid["books"]})
    run_rows([Row(variant=name, megabytes=1) for name in ("gpt", "hourglass-2-2-2")], only)
    run_rows([Row(variant="gpt", megabytes=1, learning_rate=1e-3)], only)
    records = read_records([only.out])
    assert study_table(records, "1m", "1", "0.004")[0][1:3] == ["poems", "mean, beside gpt"]
    rates = learning_rates_table(records, "1m", "1")
    assert rates[0] == ["", "0.001", "0.004"]
    assert [line[0] for line in rates[1:]] == ["gpt"]
    with pytest.raises(InputError, match="no rows scored on 'prose'"):
        profile_table(records, "by_offset", "gpt,hourglass-2-2-2", "prose", "1m", "1", "0.004")
    with pytest.raises(InputError, match="no rows of hybrid"):
        profile_table(records, "by_offset", "gpt,hybrid", "poems", "1m", "1", "0.004")
    repeats = profile_table(records, "by_repeat", "gpt,hourglass-2-2-2", "poems", "1m", "1", "0.004")
    assert repeats[0][-1] == "new" and len(repeats) == 3
    for record in records:
        record.settings["poems"].pop("by_repeat")
    with pytest.raises(InputError, match="no row of gpt has the profile by_repeat"):
        profile_table(records, "by_repeat", "gpt,hourglass-2-2-2", "poems", "1m", "1", "0.004")
    with pytest.raises(InputError, match="Did you mean 'by_offset'"):
        profile_table(records, "by_offsets", "gpt", "poems", "1m", "1", "0.004")
    assert len(BINS) == len(EDGES)
    assert [int(name.split("-")[0].rstrip("+")) for name in BINS] == list(EDGES)


@pytest.mark.parametrize("loss", ["rebuild_loss_weight", "next_sentence_loss_weight"])
def test_flops_of_training_count_all_losses(loss):
    rows = [torch.randint(3, 40, (32,)) for _ in range(2)]
    rows[0][::6] = rows[1][::5] = 1  # sentence ends
    flops = {}
    for weight in (0.0, 0.5):
        model = GPTHFForCausalLM(
            GPTHFConfig(
                vocab_size=40,
                hidden_size=16,
                num_encoder_layers=1,
                num_body_layers=1,
                num_decoder_layers=1,
                body_visibility="fast",
                **{loss: weight},
            )
        )
        flops[weight] = study_run._training_flops(model, rows)
    assert flops[0.5] > flops[0.0] > 0


def trained_row(name: str, seed: int, bits: float, size: str = "1m", megabytes: int = 1, **settings) -> Record:
    """A row of the study as its runner writes it, as far as tables and pictures read it."""
    parameters = {"1m": 1e6, "3m": 3e6}[size]
    metrics = {"poems_bits_per_byte": bits, "parameters": parameters, "training_flops": 1e12 * megabytes}
    metrics |= {"decode_flops": 1e6, "bytes": 4.0, "tokens": 1.0}
    return Record(
        theme="study",
        case="train",
        peer=name,
        workload={"size": size, "megabytes": megabytes, "learning_rate": 0.1, "seed": seed},
        metrics={key: Spread.of([value]) for key, value in metrics.items()},
        settings=settings,
    )


def test_rows_are_compared_by_means_over_seeds():
    """With the range of all pairs, since a lucky seed of the base says little."""
    bits = {("gpt", 0): 2.0, ("gpt", 1): 3.0, ("a", 1): 2.7, ("b", 0): 1.8, ("b", 1): 3.15, ("c", 7): 1.0}
    lines = study_table([trained_row(*key, value) for key, value in bits.items()], "1m", "1", "0.1")
    beside = {line[0]: line[2] for line in lines[1:]}
    assert beside == {
        "gpt": "2.5000",
        "a": "+8.0% [-10.0, +35.0]",
        "b": "-1.0% [-40.0, +57.5]",
        "c": "-60.0% [-66.7, -50.0]",
    }
    assert [line[0] for line in lines[1:]] == ["c", "b", "gpt", "a"]
    perplexity = {line[0]: line[3] for line in lines[1:]}
    assert perplexity == {"gpt": "", "a": _percent(2**0.8), "b": _percent(2**-0.1), "c": _percent(2**-6)}
    one_each = study_table([trained_row("gpt", 0, 2.0), trained_row("a", 1, 1.9)], "1m", "1", "0.1")
    assert one_each[1][:4] == ["a", "1.9000", "-5.0%", _percent(2**-0.4)]
    with pytest.raises(InputError, match="rows of gpt, 1m, 1 MB that share a seed"):
        study_table([trained_row("gpt", 0, 2.0), trained_row("gpt", 0, 2.0)], "1m", "1", "0.1")
    with pytest.raises(InputError, match="no rows of 'd'"):
        study_table([trained_row("gpt", 0, 2.0)], "1m", "1", "0.1", "gpt,d")


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def lines_of(axes) -> dict[str, tuple[list[float], list[float]]]:
    """What is drawn, by label: across and up."""
    drawn = zip(*axes.get_legend_handles_labels(), strict=True)
    lines = {label: getattr(handle, "lines", [handle])[0] for handle, label in drawn}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in lines.items()}


def names_of(axes) -> set[str]:
    """What is written beside lines."""
    return {text.get_text() for text in axes.texts}


def test_pictures_show_costs_growth_and_context():
    def context(*bits: float | None) -> dict[str, object]:
        profile = [*bits, *[None] * (len(BINS) - len(bits))]
        return {"poems": {"by_offset": profile, "by_earlier": profile}}

    rows = [
        trained_row("gpt", 0, 2.0, **context(3.0, 5.0)),
        trained_row("gpt", 1, 2.2, **context(4.0, 6.0)),
        trained_row("fast-2-4", 0, 1.8, **context(2.5, 5.5)),
        trained_row("gpt", 0, 1.9, size="3m"),
        trained_row("gpt", 0, 1.5, megabytes=4),
        trained_row("fast-2-4", 0, 1.4, megabytes=4),
    ]
    figures = {name: draw() for _, name, draw in pictures_of_study(rows)}
    assert list(figures) == ["study", "study_growth", "study_offset", "study_earlier"]
    training, writing = figures["study"].axes
    assert lines_of(training) == {"gpt": ([1, 1], [2.0, 2.2]), "fast": ([1], [1.8])}
    assert lines_of(writing)["fast"] == ([1], [1.8])
    size, text = figures["study_growth"].axes
    assert lines_of(size) == {"gpt": ([1, 3], [pytest.approx(2.1), 1.9]), "fast-2-4": ([], [])}, "one legend for both"
    assert lines_of(text) == {"gpt": ([1, 4], [pytest.approx(2.1), 1.5]), "fast-2-4": ([1, 4], [1.8, 1.4])}
    (beside,) = figures["study_earlier"].axes
    assert lines_of(beside) == {"fast-2-4": ([0, 1], [-0.5, 0.5])}, "of the one seed that both have"
    assert names_of(beside) == {"gpt", "fast-2-4"}
    assert names_of(writing) == {"gpt", "fast"}
    assert names_of(text) == {"gpt", "fast-2-4"}
    alone = [name for _, name, _ in pictures_of_study(rows[:2])]
    assert alone == ["study"], "with one architecture at one place there is nothing to compare"


def test_finalists_by_quality_and_cost(monkeypatch, tmp_path):
    """From the command, at a tiny size; the bytes held are those that a short context takes."""
    monkeypatch.setitem(study_rows.SIZES, "1m", {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2})
    monkeypatch.setattr("benchmarks.study.speed.FINALISTS", ("gpt", "fast-2-4"))
    out = tmp_path / "speed.jsonl"
    call = ["speed", "--context", "60", "--repeats", "1", "--no-compiled", "--out", str(out)]
    assert CliRunner().invoke(app, call).exit_code == 0
    again = [*call, "--context", "40"]
    assert CliRunner().invoke(app, again).exit_code == 0
    both = read_records([out])
    records = [record for record in both if record.workload.get("context") != 40]
    assert {record.workload["batch"] for record in records if record.case == "finalists"} == {1, 16}
    for seed, gpt, fast in ((0, 2.0, 1.8), (1, 3.0, 3.15)):
        for name, bits in (("gpt", gpt), ("fast-2-4", fast), ("hybrid-2-4", 1.0)):
            figures = {"poems_bits_per_byte": bits, "parameters": 2e6, "tokens": 3e6, "bytes": 9e6}
            records.append(
                Record(
                    theme="study",
                    case="train",
                    peer=name,
                    workload={"size": "1m", "megabytes": 10, "learning_rate": 0.1, "seed": seed},
                    metrics={name: Spread.of([figure]) for name, figure in figures.items()},
                )
            )
    head, *lines = finalists_table(records, "1m", "10", "0.1", "gpt,fast-2-4,hybrid-2-4")
    assert [line[0] for line in lines] == ["gpt", "fast-2-4"], "hybrid-2-4 has no decoding"
    gpt, fast = (dict(zip(head, line, strict=True)) for line in lines)
    assert gpt["bits per byte"] == "2.5000 [2.0000, 3.0000]"
    assert fast["beside gpt"] == "-1.0% [-40.0, +57.5]"
    assert fast["text"] == "10 MB, 3.0M tokens"
    # Six layers of 16 wide keys and values in float32, and counters; two closed sentences and an open one of `fast`.
    assert 6 * 63 * 2 * 16 * 4 <= 1e6 * float(gpt["KV bytes at 60"].split()[0]) < 1.5 * 6 * 113 * 2 * 16 * 4
    assert float(fast["KV bytes at 60"].split()[0]) < float(gpt["KV bytes at 60"].split()[0])
    assert gpt["tokens/s, one row, compiled"] == ""
    assert all(float(line["training tokens/s"].split()[0].replace(",", "")) > 0 for line in (gpt, fast))
    # One in 25 of what `fast` writes is a sentence end.
    written = next(record for record in records if record.peer == "fast-2-4" and record.workload.get("batch") == 1)
    assert fast["FLOPs a text token"] == f"{written.metrics['flops'].median * 50 / 48 / 1e6:.1f}M"
    studied = [record for record in records if record.theme == "study"]
    assert "KV bytes at 40" in finalists_table(both + studied, "1m", "10", "0.1")[0], "the last context measured"
    with pytest.raises(InputError, match=r"no rows of 'fast-2-5'.*fast-2-4"):
        finalists_table(records, "1m", "10", "0.1", "gpt,fast-2-5")
    with pytest.raises(InputError, match="no decoding measured at size 1m"):
        finalists_table([record for record in records if record.theme == "study"], "1m", "10", "0.1")
    with pytest.raises(ConfigError, match="size '1n' is unknown"):
        StudySpeed(size="1n")


def test_places_by_hand():
    tokenizer = load_tokenizer("tiny-gpthf")
    text = "She ran. He sat down."
    places = sentence_places(tokenizer, text, context_tokens=64)
    ids = tokenizer.encode_document(text, complete=True)
    words = [tokenizer.decode([token]) for token in ids[1:] if token != tokenizer.sentence_end_token_id]
    split = words.index(" He")
    assert places.offset.tolist() == [*range(split), *range(len(words) - split)]
    assert places.earlier.tolist() == [1] * split + [2] * (len(words) - split), "a document's start is a sentence"


def test_earlier_sentences_are_those_in_the_window():
    tokenizer = load_tokenizer("tiny-gpthf")
    text = "A dog ran. " * 40
    places = sentence_places(tokenizer, text, context_tokens=32)
    sentence_tokens = len(tokenizer.encode_document(text, complete=True)) / 40
    assert places.earlier.max() <= 32 / sentence_tokens + 1
    assert places.earlier[40:].min() >= 1, "half of the window is context"


def test_repeats_by_hand():
    """A pair counts from where it was last read, across sentence ends, within the window alone."""
    tokenizer = load_tokenizer("tiny-gpthf")
    text = "Here Ann saw Ann saw. It rained. Ann saw it."
    ids = tokenizer.encode_document(text, complete=True)
    tokens = [int(token) for token in ids if token != tokenizer.sentence_end_token_id]
    words = [tokenizer.decode([token]) for token in tokens[1:]]
    places = sentence_places(tokenizer, text, context_tokens=64)
    saw = [place for place, word in enumerate(words) if word == " saw"]
    assert places.repeat[saw].tolist() == [-1, 0, 2]
    assert places.repeat[words.index(" It")] == -1
    windowed = sentence_places(tokenizer, text, context_tokens=8)
    assert windowed.repeat[saw[-1]] == -1, "its window starts behind the last pair"


def test_repeats_are_those_of_a_search():
    """Against looking back token by token, window by window."""
    tokenizer = load_tokenizer("tiny-gpthf")
    end = tokenizer.sentence_end_token_id
    ids = tokenizer.encode_document(text := prose(3000, seed=3), complete=True)
    sentences = [sum(1 for token in ids[1:place] if token == end) for place in range(len(ids))]
    for context in (32, 256):
        expected = []
        for first, scored, stop in windows(
            ids, context_tokens=context, stride_tokens=context // 2, sentence_end_token_id=end
        ):
            tokens = [place for place in range(first, stop) if ids[place] != end]
            pairs = list(zip(tokens, tokens[1:], strict=False))
            for number, (before, here) in enumerate(pairs):
                if here < scored:
                    continue
                alike = [b for a, b in pairs[:number] if (ids[a], ids[b]) == (ids[before], ids[here])]
                expected.append(sentences[here] - sentences[alike[-1]] if alike else -1)
        places = sentence_places(tokenizer, text, context_tokens=context)
        assert places.repeat.tolist() == expected
        assert {-1, 0, 1} <= set(expected)


def test_profile_by_hand():
    """Ends are left out, and so is the document's start."""
    is_end = np.array([False, False, True, False, False, True, False, False])
    bits = np.array([0.0, 1, 9, 2, 4, 9, 8, 16])
    profile = LossProfile()
    places = Places(
        offset=np.array([0, 0, 1, 0, 1]),
        earlier=np.array([1, 2, 2, 0, 0]),
        repeat=np.array([-1, 0, 2, -1, 4]),
    )
    profile.add(DocumentBits(num_bytes=10, bits=bits, is_end=is_end), places)
    means = profile.bits_per_token()
    assert means["by_offset"] == [(1 + 2 + 8) / 3, (4 + 16) / 2, *[None] * (len(EDGES) - 2)]
    assert means["by_earlier"] == [(8 + 16) / 2, 1, (2 + 4) / 2, *[None] * (len(EDGES) - 3)]
    assert means["by_repeat"] == [2, None, 4, 16, *[None] * (len(EDGES) - 4), (1 + 8) / 2]


def test_a_model_without_sentence_ends_has_the_same_tokens():
    tokenizer, plain = load_tokenizer("tiny-gpthf"), load_tokenizer("tiny-gpt")
    text = prose(900, seed=5)
    places = sentence_places(tokenizer, text, context_tokens=64)
    counts = []
    for each in (tokenizer, plain):
        ids = each.encode_document(text, complete=True)
        is_end = ids == tokenizer.sentence_end_token_id
        profile = LossProfile()
        profile.add(DocumentBits(num_bytes=1, bits=np.ones(len(ids)), is_end=is_end), places)
        counts.append((profile.by_offset.tolist(), profile.by_earlier.tolist(), profile.by_repeat.tolist()))
    assert counts[0] == counts[1]

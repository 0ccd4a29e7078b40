"""The command line, as typed: results, and for every mistake a line that names it and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import thoughtformer
from benchmarks.report.__main__ import app as report
from lms import compressed_pair
from prose import PAGE, prose, tiny_pair, tiny_tokenizer
from thoughtformer.compression import METHODS
from thoughtformer.evaluate.profile import EDGES, PROFILES, sentence_places
from thoughtformer.models.loading import load, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny GPTHF, a plain GPT, and some text."""
    place = tmp_path_factory.mktemp("cli")
    for name, plain in (("gpthf", False), ("gpt", True)):
        model, tokenizer = tiny_pair(plain=plain)
        model.float().save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "data.txt").write_text(prose(3000), encoding="utf-8")
    (place / "prompt.txt").write_text(PAGE[:200], encoding="utf-8")
    return place


def test_generate_json(run, folder):
    code, out, _ = run(
        "generate", "--model", folder / "gpthf", "--prompt", "The ferry", "--max-new-tokens", 9, "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert {"text", "ids", "timings", "bytes"} <= result.keys()
    assert len(result["ids"]) == result["usage"]["new_tokens"] == 9
    _, tokenizer = load(folder / "gpthf")
    assert tokenizer.decode(result["ids"]) == result["text"]
    assert result["bytes"]["kv_cache"] > 0
    assert 0 < result["timings"]["first_token_seconds"] <= result["timings"]["total_seconds"]


def test_generate_streams_the_same_text(run, folder):
    arguments = ["generate", "--model", folder / "gpthf", "--file", folder / "prompt.txt", "--max-new-tokens", 20]
    arguments += ["--temperature", 0.9, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3]
    arguments += ["--repetition-penalty", 1.1]
    _, text, _ = run(*arguments)
    _, as_json, _ = run(*arguments, "--json")
    assert text == json.loads(as_json)["text"] + "\n"
    _, other, _ = run(*arguments[:-4], "--seed", 4)
    assert other != text


def test_drafts_change_no_text(run, folder):
    arguments = ["generate", "--model", folder / "gpthf", "--file", folder / "prompt.txt", "--max-new-tokens", 30]
    arguments += ["--ignore-eos", "--json"]
    results = [json.loads(run(*arguments, "--drafts", drafts)[1]) for drafts in ("off", "suffix")]
    assert results[0]["ids"] == results[1]["ids"]
    assert results[0]["usage"]["drafted_tokens"] == 0
    code, _, error = run(*arguments, "--drafts", "sufix")
    assert code == 2
    assert "--drafts 'sufix' is unknown. Did you mean 'suffix'?" in " ".join(error.split())


def test_empty_prompt(run, folder):
    code, out, _ = run("generate", "--model", folder / "gpt", "--prompt", "", "--max-new-tokens", 3, "--json")
    assert code == 0
    assert json.loads(out)["usage"]["prompt_tokens"] == 1


def test_a_prompt_from_standard_input(folder, run):
    """By a pipe or by name; line breaks at the end are an editor's."""
    command = ["generate", "-m", str(folder / "gpthf"), "--max-new-tokens", "5"]
    piped = subprocess.run(
        [sys.executable, "-m", "thoughtformer", *command], input=b"The ferry\n", capture_output=True, timeout=120
    )
    assert piped.returncode == 0, piped.stderr
    outputs = [piped.stdout.decode()]
    for arguments in ([], ["--prompt", "-"], ["--file", "-"], ["--prompt", "The ferry"]):
        code, out, err = run(*command, *arguments, stdin=b"The ferry\n")
        assert code == 0, err
        outputs.append(out)
    assert len(set(outputs)) == 1
    code, _, err = run(*command)
    assert (code, "standard input" in err) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-m", "tiny-gptf", "-p", "a"],
        ["eval", "-m", "nowhere", "-d", "x"],
        ["train", "-r", "tiny-gptf", "-d", "x", "-o", "y"],
        ["serve", "-m", "tiny-gptf"],
        ["generate", "-m", "tiny-gpt", "--adapter", "sentinels", "-p", "a"],
        ["bench", "speed", "--case", "prefil"],
        ["bench", "quality", "-d", "x", "--methods", "knorm"],
        ["compress", "train", "-m", "nowhere", "-d", "x", "--out", "y"],
        ["compress", "context", "-m", "nowhere", "--file", "x", "--out", "y"],
    ],
    ids=" ".join,
)
def test_wrong_names_are_told_before_anything_heavy_is_imported(arguments):
    script = f"import sys; sys.argv = ['thoughtformer', *{arguments!r}]\nfrom thoughtformer.cli import main\ntry:\n"
    script += "    main()\nexcept SystemExit as error:\n"
    script += "    print(error.code, [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 []", done.stdout + done.stderr
    assert any(word in done.stderr for word in ("Did you mean", "Known:", "nearest to kvpress")), done.stderr


def test_text_of_another_encoding(run, folder, tmp_path):
    text = PAGE[:300] + " Die Tür war zu."
    for encoding in ("utf-8", "latin-1", "utf-16"):
        (tmp_path / f"{encoding}.txt").write_bytes(text.encode(encoding))
    bits = set()
    for encoding in ("utf-8", "latin-1", "utf-16"):
        code, out, _ = run(
            "eval", "-m", folder / "gpthf", "-d", tmp_path / f"{encoding}.txt", "--encoding", encoding, "--json"
        )
        assert code == 0
        bits.add(json.loads(out)["bits_per_byte"])
        measured = ["bench", "quality", "--case", "bits", "--model", folder / "gpthf", "--json"]
        code, out, _ = run(*measured, "--data", tmp_path / f"{encoding}.txt", "--encoding", encoding)
        assert code == 0
        bits.add(json.loads(out)["metrics"]["bits_per_byte"]["median"])
    assert len(bits) == 1


def test_eval(run, folder):
    arguments = ["eval", "--model", folder / "gpthf", "--data", folder / "data.txt"]
    code, out, _ = run(*arguments, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["num_bytes"] == len((folder / "data.txt").read_bytes())
    assert (result["context_tokens"], result["stride_tokens"]) == (512, 256)
    _, table, _ = run(*arguments, "--batch-size", 1)
    assert f"bits per byte              {result['bits_per_byte']:.4f}" in table
    assert "stride 256" in table


@pytest.mark.parametrize("name", ["gpthf", "gpt"])
def test_eval_profiles(run, folder, name):
    """The bins' means, weighed by tokens, are the mean of all tokens; the figures beside them stay."""
    arguments = [
        "eval",
        "--model",
        folder / name,
        "--data",
        folder / "data.txt",
        "--context-tokens",
        64,
        "--stride-tokens",
        24,
    ]
    result = json.loads(run(*arguments, "--profiles", "--json")[1])
    without = json.loads(run(*arguments, "--json")[1])
    assert without == {key: value for key, value in result.items() if key not in PROFILES}
    document = (folder / "data.txt").read_text()
    tokenizer = load_tokenizer(folder / name, insert_sentence_ends=True)
    places = sentence_places(tokenizer, document, context_tokens=64, stride_tokens=24)
    for key, bins in PROFILES.items():
        each = getattr(places, key.removeprefix("by_"))
        counts = np.bincount(np.where(each < 0, 8, np.searchsorted(EDGES, each, side="right") - 1), minlength=9)
        means = np.array([bits or 0.0 for bits in result[key]])
        assert len(means) == len(bins)
        mean = (means * counts[: len(bins)]).sum() / counts.sum()
        assert 2**mean == pytest.approx(result["token_perplexity"])
    table = run(*arguments, "--profiles")[1]
    assert "sentences since the same pair of tokens was read" in table
    assert f"{result['by_repeat'][-1]:.2f}" in table.splitlines()[-1]


def test_several_data_sources_after_one_flag(run, folder):
    data = [folder / "data.txt", folder / "prompt.txt"]
    code, out, _ = run("eval", "--data", *data, "--model", folder / "gpthf", "--json")
    assert code == 0
    assert json.loads(out)["num_bytes"] == sum(len(path.read_bytes()) for path in data)
    assert run("eval", "-d", data[0], "-d", data[1], "--model", folder / "gpthf", "--json")[1] == out


def test_tokenizer_train(run, folder, tmp_path):
    code, out, _ = run(
        "tokenizer", "train", "--data", folder / "data.txt", "--vocab-size", 300, "--out", tmp_path / "t"
    )
    assert code == 0
    assert "300 tokens" in out
    code, _, err = run("tokenizer", "train", "--data", folder / "data.txt", "--out", tmp_path / "t")
    assert (code, "not an empty folder" in err) == (2, True)


def test_train_and_generate(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("THOUGHTFORMER_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    shape = {"hidden_size": 16, "num_encoder_layers": 1, "num_body_layers": 1, "num_attention_heads": 2}
    recipe = {"model": shape | {"max_sentence_tokens": 64}, "tokenizer": str(tmp_path / "tokenizer"), "row_tokens": 64}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    train = ["train", "--config", tmp_path / "recipe.yaml", "--data", folder / "data.txt", "--out", tmp_path / "out"]
    train += ["--set", "max_steps=4", "--set", "log_every_steps=2", "--set", "save_every_steps=2"]
    code, _, err = run(*train)
    assert code == 0
    assert "step 4/4" in err
    assert "tokens/s" in err
    assert run(*train)[0] == 2
    assert run(*train, "--overwrite")[0] == 0
    assert run("generate", "--model", tmp_path / "out", "--prompt", "A", "--max-new-tokens", 3)[0] == 0


def test_info(run, folder):
    code, out, _ = run("info", "--model", folder / "gpthf", "--json")
    assert code == 0
    assert json.loads(out)["body_visibility"] == "hybrid"
    assert "torch" in run("info")[1]


@pytest.mark.parametrize(("kind", "windows"), [("gemma3_text", ["2 of 12"]), ("llama", [])])
def test_info_of_another_causal_lm(run, tmp_path, kind, windows):
    lm, tokenizer = compressed_pair(kind, METHODS["full"]())
    lm.close()
    lm.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    facts = json.loads(run("info", "--model", tmp_path, "--json")[1])
    assert facts["can_be_compressed"] is True
    assert facts["layers_with_a_window"] == windows
    assert "head_dim" in run("info", "--model", tmp_path)[1]


MISTAKES = {
    "encoding": (
        ["eval", "-m", "{folder}/gpthf", "-d", "{folder}/data.txt", "--encoding", "utf9"],
        "none that Python knows",
    ),
    "other encoding": (["eval", "-m", "{folder}/gpthf", "-d", "{folder}/latin.txt"], "which --encoding names"),
    "two prompts": (["generate", "-p", "a", "-f", "{folder}/data.txt"], "either --prompt TEXT or --file FILE"),
    "no command": (["bogus"], "No such command 'bogus'"),
    "missing prompt": (["generate"], "either --prompt TEXT or --file FILE"),
    "missing file": (["generate", "--file", "nowhere.txt"], "can't read nowhere.txt"),
    "binary file": (["generate", "--file", "{folder}/binary"], "zero byte"),
    "no tokens": (["generate", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
    "negative tokens": (["generate", "--prompt", "a", "--max-new-tokens", "-5"], "max_new_tokens=-5"),
    "temperature": (["generate", "--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
    "unknown model": (["generate", "--prompt", "a", "--model", "tiny-gpthff"], "Did you mean 'tiny-gpthf'"),
    "too long": (["generate", "-m", "{folder}/gpthf", "-f", "{folder}/data.txt"], "Shorten the prompt"),
    "too many": (["generate", "-m", "{folder}/gpthf", "-p", "a", "--max-new-tokens", "600"], "new tokens at most"),
    "removed alone": (["generate", "-p", "a", "--removed", "0.5"], "how an --adapter folds"),
    "removed of a context": (["generate", "-p", "a", "--context", "a.ctx", "--removed", "0.5"], "leave out --removed"),
    "eval missing": (["eval", "-m", "{folder}/gpthf", "--data", "nowhere"], "no file or folder 'nowhere'"),
    "eval empty": (["eval", "-m", "{folder}/gpthf", "--data", "{folder}/empty.txt"], "every document is empty"),
    "eval binary": (["eval", "-m", "{folder}/gpthf", "--data", "{folder}/binary.txt"], "zero byte"),
    "eval column": (["eval", "-m", "{folder}/gpthf", "--data", "{folder}/a.jsonl", "--column", "txt"], "mean 'text'"),
    "eval window": (["eval", "-m", "{folder}/gpthf", "-d", "{folder}/data.txt", "--context-tokens", "9999"], "512"),
    "unknown recipe": (["train", "--recipe", "tiny-gpthg", "-d", "x", "-o", "y"], "Did you mean 'tiny-gpthf'"),
    "unknown key": (["train", "-r", "tiny-gpt", "-d", ".", "-o", "y", "--set", "epoch=1"], "Did you mean 'epochs'"),
    "no recipe": (["train", "-d", "x", "-o", "y"], "either --recipe NAME or --config FILE"),
    "train missing": (
        ["train", "-r", "tiny-gpt", "-d", "nowhere", "-o", "{folder}/new"],
        "no file or folder 'nowhere'",
    ),
    "vocabulary": (["tokenizer", "train", "-d", "{folder}/data.txt", "-o", "{folder}/t", "--vocab-size", "9"], "259"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_named_with_exit_code_2(run, folder, name):
    (folder / "empty.txt").write_text("")
    (folder / "binary").write_bytes(b"\0\1\2")
    (folder / "binary.txt").write_bytes(b"abc\0\1\2")
    (folder / "latin.txt").write_bytes("Die Tür war zu.".encode("latin-1"))
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    arguments, message = MISTAKES[name]
    before = sorted(folder.rglob("*"))
    code, out, err = run(*[argument.replace("{folder}", str(folder)) for argument in arguments])
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    assert sorted(folder.rglob("*")) == before, "nothing half-written is left"


def test_extrapolation_on_request(run, folder):
    arguments = ["generate", "-m", folder / "gpthf", "-p", "a", "--max-new-tokens", 520]
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--allow-extrapolation")[0] == 0


@pytest.mark.parametrize(
    "arguments", [[], ["generate"], ["train"], ["eval"], ["demo"], ["info"], ["tokenizer", "train"]]
)
def test_help_has_an_example(run, arguments):
    code, out, _ = run(*arguments, "--help")
    assert code == 0
    assert not arguments or "Example: thoughtformer" in " ".join(out.split())


def test_version(run):
    assert run("--version") == (0, thoughtformer.__version__ + "\n", "")


def test_help_imports_nothing_heavy():
    """The start is quick because torch and transformers stay out; counted instead of timed."""
    script = (
        "import sys; sys.argv = ['thoughtformer', '--help']\nfrom thoughtformer.cli import main\ntry:\n    main()\n"
    )
    script += "except SystemExit:\n    print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_closed_pipe_ends_quietly(folder):
    """`thoughtformer generate ... | head -c 1`, as a module."""
    command = [sys.executable, "-m", "thoughtformer", "generate", "-m", str(folder / "gpthf"), "-p", "The"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "300"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(timeout=120) == 1  # click's code for it


def test_no_network_is_needed(folder):
    """With every proxy pointing nowhere."""
    dead = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "thoughtformer", "generate", "-m", str(folder / "gpt"), "-p", "The"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "2", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | dead,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_bench_measures_and_reports(run, tmp_path):
    """The rest runs at toy size in CI (.ci/run)."""
    results = tmp_path / "results" / "toy.jsonl"
    code, out, _ = run("bench", "memory", "--case", "kv_bytes", "--size", "toy", "--out", results)
    assert code == 0
    assert "gpthf 4+2" in out
    assert run("bench", "flops", "--size", "toy", "--out", results, "--json")[0] == 0
    code, _, error = run("nothing.jsonl", "--out", tmp_path / "report", command=report)
    assert (code, "can't read nothing.jsonl" in error) == (2, True)
    code, out, _ = run(results.parent, "--out", tmp_path / "report", command=report)
    assert code == 0
    assert (tmp_path / "report" / "kv_bytes-dark.svg").exists()
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img") == len(list((tmp_path / "report").glob("*-light.svg"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed", "--case", "prefil"), "Did you mean 'prefill'"),
        (("speed", "--size", "huge"), "size 'huge' is unknown"),
        (("speed", "--contexts", "64"), "name them by --case"),
        (("speed", "--case", "prefill", "--contexts", "0"), "2 tokens or more"),
        (("speed", "--case", "prefill", "--contexts", "many"), "numbers with commas"),
        (("memory", "--case", "kv_bytes", "--size", "toy", "--contexts", "10"), "two sentences"),
        (("quality", "--data", "a.txt", "--removed", "1"), "between 0 and 1"),
        (("quality", "--data", "a.txt", "--methods", "h20"), "Did you mean 'h2o'"),
        (("peers", "--install", "vllm"), "peer 'vllm' is unknown"),
        (("flops", "--out", "/proc/no/x.jsonl"), "can't write to"),
    ],
)
def test_bench_names_the_mistake(run, arguments, message):
    code, out, error = run("bench", *arguments)
    assert code == 2
    assert message in error
    assert not out

"""Where a text ends, by the command line."""

from __future__ import annotations

import json

import pytest

from prose import tiny_pair
from thoughtformer.cli.serve import _origin

COMPRESSED = (
    "--model",
    "tiny-gpt",
    "--adapter",
    "tiny-gpt-sentinel",
    "--prompt",
    "The sea was calm. The boat",
    "--json",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("ends") / "gpthf"
    model, tokenizer = tiny_pair()
    model.float().save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def asked(run, *arguments: object) -> dict:
    code, out, err = run("generate", *arguments)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("compressed", [False, True], ids=["gpthf", "compressed"])
def test_stop_tokens(run, folder, compressed):
    where = COMPRESSED if compressed else ("--model", folder, "--prompt", "The ferry", "--json")
    free = asked(run, *where, "--max-new-tokens", 12, "--ignore-eos")
    assert len(free["ids"]) == 12
    place = next(at for at in range(3, 12) if free["ids"][at] not in free["ids"][:at])
    token = free["ids"][place]
    # Twice, because the first needn't be met.
    ended = asked(
        run, *where, "--max-new-tokens", 12, "--ignore-eos", "--stop-token-id", 399, "--stop-token-ids", token
    )
    assert ended["ids"] == free["ids"][: place + 1]
    # The half of a character that an end leaves shows as U+FFFD.
    assert free["text"].startswith(ended["text"].rstrip("\ufffd"))
    assert len(ended["text"]) < len(free["text"])


def test_a_special_token_as_stop_string(run, folder):
    where = ("--model", folder, "--prompt", "The ferry", "--json", "--max-new-tokens", 60, "--ignore-eos")
    free = asked(run, *where)
    _, tokenizer = tiny_pair()
    end = tokenizer.sentence_end_token_id
    assert end in free["ids"]
    ended = asked(run, *where, "--stop", "<|endofsentence|>")
    assert ended["ids"] == free["ids"][: free["ids"].index(end) + 1]
    assert ended["finish_reason"] == "stop_string"


def test_without_a_seed_every_run_differs(run, folder):
    for where in (COMPRESSED, ("--model", folder, "--prompt", "The ferry", "--json")):
        warm = (*where, "--max-new-tokens", 16, "--temperature", 1.5, "--ignore-eos")
        assert asked(run, *warm)["ids"] != asked(run, *warm)["ids"]
        assert asked(run, *warm, "--seed", -3)["ids"] == asked(run, *warm, "--seed", -3)["ids"]
        assert (
            asked(run, *warm, "--top-p", 0)["ids"] == asked(run, *where, "--max-new-tokens", 16, "--ignore-eos")["ids"]
        )


@pytest.mark.parametrize("origin", ["chat.example.org", "https://chat.example.org/page", "https://", "/"])
def test_what_is_no_origin(run, origin):
    code, _, err = run("serve", "--cors-origin", origin)
    assert code == 2
    assert "is no origin" in err


def test_origins_are_as_browsers_write_them():
    assert [_origin(given) for given in ("https://Chat.example.org/", "http://localhost:3000", "*", "null")] == [
        "https://chat.example.org",
        "http://localhost:3000",
        "*",
        "null",
    ]

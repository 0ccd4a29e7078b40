"""Shared fixtures: tiny models in float64, text written for the tests.

With CHECK_SHAPES=1 in the environment, the shapes of tensors are checked at run time, against their annotations. That
takes five times as long, so of every parametrized test one case in sixty runs then; `make test` does both.
"""

from __future__ import annotations

import os
from collections import Counter

from jaxtyping import install_import_hook

CHECKS_SHAPES = os.environ.get("CHECK_SHAPES") == "1"
#: Of a test's cases, one in so many runs with checks.
ONE_IN = 60
#: Configurations are left out: the hook replaces a dataclass's constructor, and transformers' takes unknown keywords;
#: so are modules whose functions tests give what they must refuse.
CHECKED = [
    "attention",
    "rules",
    "cache",
    "sampling",
    "decode",
    "stores.model_sentences",
    "engine.batch",
    "text.packing",
]
CHECKED += [f"models.{name}" for name in ("backbone", "chunked_loss", "handed_in", "padding")]
CHECKED += [
    f"models.gpthf.{name}"
    for name in ("causal_lm", "depths", "encoding", "known_sentences", "layers", "modeling", "stages")
]
CHECKED += [f"runners.{name}" for name in ("base", "causal_lm", "gpthf")]
CHECKED += ["compression.at_once", "compression.on_cache", "compression.model", "compression.methods"]
if CHECKS_SHAPES:
    # Before the first import of the package.
    with install_import_hook([f"thoughtformer.{module}" for module in CHECKED], "beartype.beartype"):
        import thoughtformer.engine
        import thoughtformer.text.packing

import io
import sys
from dataclasses import asdict

import pytest
import torch
import typer

import twins
from thoughtformer.cache import GPTHFCache
from thoughtformer.cli import app, main
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
from thoughtformer.models.gpthf.known_sentences import SentenceSource
from thoughtformer.recipes import recipe
from thoughtformer.rules import BODY_RULES

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With checks of shapes: the first of every sixty cases of a test."""
    if not CHECKS_SHAPES:
        return
    seen: Counter[str] = Counter()
    left = []
    for item in list(items):
        name = item.nodeid.partition("[")[0]
        if seen[name] % ONE_IN:
            items.remove(item)
            left.append(item)
        seen[name] += 1
    config.hook.pytest_deselected(items=left)


#: Body rules, and the hourglass, whose body is fast.
VISIBILITIES = (*BODY_RULES, "hourglass")
END, START, PAD = 1, 0, 2
VOCAB = 40


def tiny_config(visibility: str = "hybrid", **changes: object) -> GPTHFConfig:
    """A configuration small enough for hundreds of forward passes a second."""
    settings: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_encoder_layers": 2,
        "num_body_layers": 2,
        "num_attention_heads": 4,
        "body_visibility": visibility,
        "max_position_embeddings": 256,
        "max_sentence_tokens": None,
    }
    if visibility in twins.RULES:
        settings |= twins.RULES[visibility].settings
    if visibility == "hourglass":
        settings |= {"body_visibility": "fast", "num_encoder_layers": 1, "num_decoder_layers": 2}
    return GPTHFConfig(**(settings | changes))


def tiny_model(visibility: str = "hybrid", *, seed: int = 0, **changes: object) -> GPTHFForCausalLM:
    """A random float64 model whose attention is far from uniform, so that a wrong mask shows."""
    model = GPTHFForCausalLM(tiny_config(visibility, **changes)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4, generator=generator)
        for name, parameter in model.named_parameters():
            if "depths" in name:
                parameter.normal_(generator=generator)
    return model


def _default_switches() -> dict[str, object]:
    """Layers and switches of the default recipe, whatever they are, at the tests' widths."""
    shape = asdict(recipe("tiny-gpthf").model)
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "max_sentence_tokens")
    return {name: value for name, value in shape.items() if name not in widths} | {"visibility": "hourglass"}


#: Every switch of the architecture alone, all that go together, and the combination that the bundled model has.
SWITCHES: dict[str, dict[str, object]] = {
    "hourglass_recent": {"visibility": "hourglass", "recent_sentences": 1},
    "hourglass_recent_2": {"visibility": "hourglass", "recent_sentences": 2, "num_decoder_layers": 1},
    "summaries_2": {"visibility": "hourglass", "summaries_per_sentence": 2},
    "summaries_4": {"visibility": "hourglass", "summaries_per_sentence": 4, "body_positions": "sentence"},
    "no_memory_positions": {"visibility": "hourglass", "memory_positions": "none"},
    "own_summary": {"visibility": "hourglass", "ends_read_own_summary": True},
    "wide_body": {"visibility": "hourglass", "body_hidden_size": 32},
    "narrow_body": {"visibility": "hourglass", "body_hidden_size": 8, "body_intermediate_size": 20},
    "body_depths": {"visibility": "hourglass", "num_encoder_layers": 2, "body_reads_depths": True},
    "decoder_depths": {"visibility": "hourglass", "num_encoder_layers": 2, "decoder_reads_depths": True},
    "hybrid_recent": {"visibility": "hybrid", "recent_sentences": 1},
    "hybrid_recent_2": {"visibility": "hybrid", "recent_sentences": 2},
    "keep_last_recent": {"visibility": "keep_last", "recent_sentences": 1},
    "hybrid_wide_body": {"visibility": "hybrid", "body_hidden_size": 32},
    "hybrid_depths": {"visibility": "hybrid", "body_reads_depths": True},
    "everything": {
        "visibility": "hourglass",
        "num_key_value_heads": 2,
        "recent_sentences": 2,
        "summaries_per_sentence": 2,
        "ends_read_own_summary": True,
        "body_hidden_size": 24,
        "body_reads_depths": True,
        "decoder_reads_depths": True,
        "body_positions": "sentence",
        "num_decoder_layers": 2,
    },
    "default_recipe": _default_switches(),
}


@pytest.fixture(params=list(SWITCHES))
def switched_model(request: pytest.FixtureRequest) -> GPTHFForCausalLM:
    """A tiny model for each switch, and for their combination."""
    return tiny_model(**SWITCHES[request.param])  # type: ignore[arg-type]


@pytest.fixture(params=VISIBILITIES)
def visibility(request: pytest.FixtureRequest) -> str:
    """Each body rule in turn."""
    return request.param


@pytest.fixture(params=[4, 2], ids=["plain_heads", "grouped_heads"])
def model(request: pytest.FixtureRequest, visibility: str) -> GPTHFForCausalLM:
    """A tiny model for each rule, with plain and with grouped-query heads."""
    return tiny_model(visibility, num_key_value_heads=request.param)


def random_text(num_tokens: int, *, seed: int, end_every: float = 6.0) -> torch.Tensor:
    """Ids of one document: a start, then tokens with sentence ends among them, adjacent ones too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (num_tokens,), generator=generator)
    ids[torch.rand(num_tokens, generator=generator) < 1 / end_every] = END
    ids[0] = START
    return ids


def places_of(ids: torch.Tensor) -> list[twins.Place]:
    """Sentences as the twins know them, counted over all documents."""
    places, sentence = [], 0
    for number, token in enumerate(ids.tolist()):
        if token == START and number and not places[-1].is_end:
            sentence += 1
        places.append(twins.Place(sentence, token in (END, START)))
        sentence += token in (END, START)
    return places


def entries_expected(model: GPTHFForCausalLM, ids: torch.Tensor) -> dict[str, int]:
    """Entries that each stage must hold after `ids`, from the twins' words instead of from the rules."""
    config = model.config
    document = ids[(ids == START).nonzero()[-1].item() :] if (ids == START).any() else ids
    ends = [-1, *((document == END) | (document == START)).nonzero().flatten().tolist()]
    closed, num_open = len(ends) - 1, len(document) - 1 - ends[-1]
    # With recent sentences, the open one's tokens and those of so many before it.
    near = len(document) - 1 - ends[max(0, closed - config.recent_sentences)]
    if config.num_decoder_layers:
        summaries = closed * config.summaries_per_sentence
        return {"encoder": num_open, "body": summaries, "decoder": near, "memory": summaries}
    if config.recent_sentences:
        body = closed + near - min(closed, config.recent_sentences)
    else:  # what an ordinary token would read that came next
        places, reads = places_of(torch.cat([document, torch.tensor([3])])), twins.RULES[config.body_visibility].reads
        body = sum(reads(places, len(document), number) for number in range(len(document)))
    return {"encoder": num_open, "body": body} if config.num_encoder_layers else {"body": body}


#: Texts that meet the edges, by name.
TEXTS = {
    "one_token": torch.tensor([START]),
    "no_end": random_text(30, seed=1, end_every=1e9),
    "one_token_sentences": torch.tensor([START, 5, END, 6, END, 7, END, 8]),
    "adjacent_ends": torch.tensor([START, 5, 6, END, END, END, 7, 8, END, 9]),
    "ends_at_end": torch.tensor([START, 5, 6, END, 7, 8, END]),
    "starts_with_end": torch.tensor([END, 5, 6, END, 7]),
    "no_start": torch.tensor([5, 6, END, 7, 8, 9]),
    "long_sentence": torch.cat([random_text(20, seed=2), torch.full((90,), 7), random_text(12, seed=3)[1:]]),
    "two_documents": torch.cat([random_text(25, seed=4), random_text(18, seed=5)]),
    "documents_unfinished": torch.tensor([START, 5, 6, START, START, 7, END, START, 8, 9]),
    "mixed": random_text(70, seed=6),
}


@pytest.fixture(params=list(TEXTS), ids=list(TEXTS))
def text(request: pytest.FixtureRequest) -> torch.Tensor:
    """Each edge text in turn, shape (tokens,)."""
    return TEXTS[request.param]


ATOL = 1e-9


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@torch.no_grad()
def full_logits(model: GPTHFForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids[None], use_cache=False).logits[0]


@torch.no_grad()
def chunked_logits(model: GPTHFForCausalLM, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache, parts = model.new_cache(1), []
    for chunk in ids.split(sizes):
        parts.append(model(chunk[None], cache=cache).logits[0])
    return torch.cat(parts)


#: Sentences and documents that end between any two tokens.
RESTLESS = torch.tensor([START, 5, END, 8, END, END, 6, START, 4, END, 3])


@torch.no_grad()
def check_last_logits_of_pieces(model: GPTHFForCausalLM, source: SentenceSource | None = None) -> None:
    """Pieces of 2 to 4 tokens on top of what came before, asked for their last logits alone; then the token after.

    Of a piece's tokens, some skip a stage, and these may end what the stage holds.
    """
    expected = full_logits(model, RESTLESS)

    def last_logits(cache: GPTHFCache, first: int, last: int) -> torch.Tensor:
        number = last - first
        wanted = torch.arange(number) == number - 1
        row = torch.zeros(number, dtype=torch.long)
        return model.ragged_logits(RESTLESS[first:last], row, cache, wanted=wanted, sentence_source=source)[0]

    for first in range(1, len(RESTLESS) - 2):
        before = model.new_cache(1)
        last_logits(before, 0, first)
        for last in range(first + 2, min(first + 5, len(RESTLESS))):
            cache = before.fork()
            close(last_logits(cache, first, last), expected[last - 1 : last])
            close(last_logits(cache, last, last + 1), expected[last : last + 1])


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line, thoughtformer's by default; returns (exit code, standard output, standard error)."""

    def run(*arguments: object, command: typer.Typer = app, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["thoughtformer", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit_:
            main(command)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run

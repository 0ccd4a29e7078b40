"""What breaks first when transformers changes: `generate` with its cache, without it, and the engine write one text.

Every kind of model, with the cache by both of its names, padded on either side; arguments that nobody knows raise.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import Cache, StoppingCriteria, StoppingCriteriaList

from lms import CONFIGS, TINY_METHODS, compressed_pair
from prose import PAGE, tiny_pair
from thoughtformer import Engine, SamplingParams
from thoughtformer.cache import GPTHFCache
from thoughtformer.cache.compressed import CompressedCache
from thoughtformer.compression import Full, Method
from thoughtformer.errors import ArgumentError, InputError, UnsupportedError
from thoughtformer.models.transformers_api import CACHE_NAMES

NEW_TOKENS = 12
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}

#: Every family with nothing dropped, and methods whose caches drop, fold and overwrite.
COMPRESSED: dict[str, tuple[str, Method]] = {
    **{family: (family, Full()) for family in (*CONFIGS, "plain")},
    **{method.name: ("llama", method) for method in TINY_METHODS.values() if method.name != "full"},
}
OWN = {
    "gpt": {"plain": True},
    "gpthf": {},
    "hourglass": {"body_visibility": "fast", "num_decoder_layers": 2, "recent_sentences": 1},
}
KINDS = [*OWN, *(f"compressed {name}" for name in COMPRESSED)]
#: Those whose rows can be joined.
IN_ENGINE = [*OWN, *(f"compressed {name}" for name, (_, method) in COMPRESSED.items() if method.can_join)]


def canary(kind: str) -> tuple[Any, Any]:
    """A tiny random float64 model and its tokenizer."""
    if kind in OWN:
        return tiny_pair(**OWN[kind])
    return compressed_pair(*COMPRESSED[kind.removeprefix("compressed ")])


def prompt_ids(tokenizer: Any, characters: int = 160) -> torch.Tensor:
    return torch.tensor([tokenizer(PAGE[:characters])["input_ids"]])


def naive(model: Any, ids: torch.Tensor, new_tokens: int = NEW_TOKENS) -> list[int]:
    """Each token from the whole text, without a cache; what `generate` can't have broken."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(new_tokens):
            chosen = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, chosen], dim=1)
            if int(chosen) in ends:
                break
    return ids[0, start:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_equals_naive(kind):
    model, tokenizer = canary(kind)
    ids = prompt_ids(tokenizer)
    mask = torch.ones_like(ids)
    expected = naive(model, ids)
    for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 7}):
        written = model.generate(ids, attention_mask=mask, **GREEDY, **settings)[0, ids.shape[1] :].tolist()
        assert written == expected, settings


@pytest.mark.parametrize("kind", IN_ENGINE)
def test_the_engine_writes_the_same(kind):
    model, tokenizer = canary(kind)
    ids = prompt_ids(tokenizer)
    done = Engine(model, tokenizer).generate([ids[0].tolist()], SamplingParams(max_new_tokens=NEW_TOKENS))[0]
    assert done.ids == naive(model, ids)


@pytest.mark.parametrize(
    "kind", [*OWN, *(f"compressed {name}" for name in ("llama", "gemma3_text", "sentinel", "h2o"))]
)
def test_a_cache_goes_by_both_names(kind):
    """In and out: of `forward`, and of `generate`, whichever this transformers reads."""
    model, tokenizer = canary(kind)
    ids = prompt_ids(tokenizer)
    mask = torch.ones_like(ids)
    expected = naive(model, ids)
    for name in CACHE_NAMES:
        with torch.no_grad():
            first = model(ids[:, :-1], use_cache=True)
            held = getattr(first, name)
            assert held is first[name] is first.get(name)
            assert name in first
            assert isinstance(held, Cache)
            assert held.get_seq_length() == ids.shape[1] - 1
            second = model(ids[:, -1:], **{name: held})
            assert getattr(second, name) is held
        assert int(second.logits[0, -1].argmax()) == expected[0]

        output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
        assert getattr(output, name).get_seq_length() == output.sequences.shape[1] - 1
        again = model.new_cache(1)
        with torch.no_grad():
            model(ids[:, :-1], **{name: again})
        written = model.generate(ids, attention_mask=mask, **{name: again}, **GREEDY)
        assert torch.equal(written, output.sequences)
        assert again.get_seq_length() == written.shape[1] - 1, "the cache that was given is the one that was read"
    with pytest.raises(InputError, match="two names of one thing"):
        model(ids, cache=model.new_cache(1), past_key_values=model.new_cache(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_padded_on_either_side_equals_its_rows(kind):
    """Greedy tokens of rows of unlike length, padded left or right, are those of each row alone."""
    model, tokenizer = canary(kind)
    rows = [prompt_ids(tokenizer, characters)[0] for characters in (160, 40, 95)]
    width = max(map(len, rows))
    expected = [naive(model, row[None]) for row in rows]
    for side in ("left", "right"):
        ids = torch.full((len(rows), width), 2)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
            ids[number, place], mask[number, place] = row, 1
        for settings in ({}, {"use_cache": False}) if side == "left" else ({},):
            written = model.generate(ids, attention_mask=mask, **GREEDY, **settings)[:, width:].tolist()
            assert [row[: len(best)] for row, best in zip(written, expected)] == expected, (side, settings)


class _Recording(StoppingCriteria):
    def __init__(self) -> None:
        self.arguments: list[dict[str, Any]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("kind", ["gpt", "gpthf", "compressed llama"])
def test_what_generate_hands_to_forward_is_known_and_used(kind, monkeypatch):
    """The list is short; what a new release adds to it must be looked at before it is let in."""
    model, tokenizer = canary(kind)
    seen: set[str] = set()
    forward = type(model).forward

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(name for name, value in kwargs.items() if value is not None)
        return forward(self, *args, **kwargs)

    recording.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", recording)
    ids = prompt_ids(tokenizer)
    criteria = StoppingCriteriaList([_Recording()])
    for settings in ({}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}):
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **(GREEDY | settings))
    known = {"input_ids", "attention_mask", *CACHE_NAMES, "use_cache", "logits_to_keep", "position_ids", "return_dict"}
    assert seen <= known | {"output_attentions", "output_hidden_states"}


@pytest.mark.parametrize("kind", ["gpt", "gpthf", "compressed llama", "compressed h2o"])
def test_unknown_arguments_raise_by_name(kind):
    model, tokenizer = canary(kind)
    ids = prompt_ids(tokenizer)
    with pytest.raises(ArgumentError, match=r"'atention_mask'.*attention_mask"):
        model(ids, atention_mask=torch.ones_like(ids))
    with pytest.raises(TypeError, match="next_months_cache"):
        model(ids, next_months_cache=model.new_cache(1))
    for name, value in (
        ("output_attentions", True),
        ("cu_seq_lens_q", torch.tensor([0, 3])),
        ("is_causal", True),
        ("output_router_logits", True),
    ):
        with pytest.raises(UnsupportedError, match=name):
            model(ids, **{name: value})
        model(ids, **{name: None})
    with pytest.raises((InputError, UnsupportedError), match="embed"):
        model(ids, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="next_months_setting"):
        model.generate(ids, next_months_setting=1)


@pytest.mark.parametrize("kind", [GPTHFCache, CompressedCache])
def test_caches_answer_all_that_transformers_asks_a_cache(kind):
    """Nothing is derived from the empty list of layers, whatever a release adds to it."""
    public = {name for name in vars(Cache) if not name.startswith("_")} | {"__len__"}
    inherited = {name for name in public if getattr(kind, name) is getattr(Cache, name)}
    assert not inherited, f"{kind.__name__} leaves these to transformers: {sorted(inherited)}"

"""transformers' `generate` with drafts writes what it writes without, in fewer passes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import thoughtformer
from lms import SERVED, compressed_pair, served_pair, tiny_lm
from prose import KINDS, PAGE, tiny_pair
from thoughtformer.compression import Full, compress
from thoughtformer.decode import Drafter, DraftModel, Suffix
from thoughtformer.errors import InputError, UnsupportedError
from thoughtformer.models.transformers_api import CACHE_NAME

SETTINGS = {
    "greedy": {"do_sample": False},
    "penalised": {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 20},
    "drawn": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
}


class Known(Drafter):
    """Knows the text, and errs at every fifth place."""

    def __init__(self, text):
        self.text = text

    def propose(self, ids, most):
        draft = self.text[len(ids) : len(ids) + min(5, most)]
        return [token if (len(ids) + place) % 5 else 7 for place, token in enumerate(draft)]


class Strange(Drafter):
    def propose(self, ids, most):
        return [3, 5, 10**9, -1] if len(ids) % 2 else [0.5]


def pair_of(kind):
    if kind in KINDS:
        return tiny_pair(**KINDS[kind])
    if kind in ("llama", "gpt2", "gemma3_text"):
        return tiny_lm(kind), None
    return served_pair(kind)


def prompt_of(tokenizer):
    if tokenizer is None:
        return torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    return torch.tensor([tokenizer(PAGE[:90])["input_ids"]])


@pytest.mark.parametrize("settings", list(SETTINGS))
@pytest.mark.parametrize("kind", [*KINDS, "llama", "gpt2", "gemma3_text", "streaming_llama", "sentinel_plain"])
def test_texts_are_those_of_generate(kind, settings):
    if kind not in KINDS and kind not in SERVED and kind not in ("llama", "gpt2", "gemma3_text"):
        kind = next(case for case in SERVED if case.startswith(kind.partition("_")[0]))
    model, tokenizer = pair_of(kind)
    ids = prompt_of(tokenizer)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, **SETTINGS[settings]}

    def written(**more):
        torch.manual_seed(4)
        return model.generate(ids, **arguments, **more)

    expected = written()
    for drafts in ("suffix", Known(expected[0].tolist()), Strange(), [Strange(), Suffix()]):
        assert torch.equal(written(custom_generate=thoughtformer.speculate, drafts=drafts), expected)
    padded = torch.cat([torch.full((1, 3), 2), ids], dim=1)
    arguments["attention_mask"] = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    ids = padded
    if settings != "penalised":  # which counts padding as seen
        again = written(custom_generate=thoughtformer.speculate, drafts="suffix")
        assert torch.equal(again[:, 3:], expected)
        assert torch.equal(again, written())


def test_it_takes_fewer_passes_and_ends_where_it_should():
    model, tokenizer = tiny_pair(plain=True)
    ids, passes = prompt_of(tokenizer), []
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 41, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **arguments)
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    right = Known(expected[0].tolist())
    right.propose = lambda text, most: right.text[len(text) : len(text) + min(4, most)]
    drafted = model.generate(ids, custom_generate=thoughtformer.speculate, drafts=right, **arguments)
    hook.remove()
    assert torch.equal(drafted, expected)
    assert len(passes) == 1 + 8

    class At(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([input_ids.shape[1] >= ids.shape[1] + 12])

    stopped = model.generate(
        ids,
        custom_generate=thoughtformer.speculate,
        drafts=Known(expected[0].tolist()),
        stopping_criteria=StoppingCriteriaList([At()]),
        return_dict_in_generate=True,
        **arguments,
    )
    assert torch.equal(stopped.sequences, expected[:, : ids.shape[1] + 12])
    assert stopped.cache.get_seq_length() == stopped.sequences.shape[1] - 1
    end = int(expected[0, ids.shape[1] + 6])
    arguments["eos_token_id"] = end
    assert torch.equal(
        model.generate(ids, custom_generate=thoughtformer.speculate, drafts=Known(expected[0].tolist()), **arguments),
        model.generate(ids, **arguments),
    )


@pytest.mark.parametrize("kind", ["plain", "hourglass", "sentinel_plain"])
def test_a_turn_goes_on_from_a_cache(kind):
    model, tokenizer = pair_of(kind)
    ids = prompt_of(tokenizer)
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    texts = []
    for more in ({}, {"custom_generate": thoughtformer.speculate, "drafts": "suffix"}):
        cache, text = model.new_cache(1), ids
        for _ in range(2):
            text = model.generate(text, attention_mask=torch.ones_like(text), cache=cache, **arguments, **more)
            text = torch.cat([text, ids[:, 1:7]], dim=1)
        texts.append(text)
    assert torch.equal(*texts)


@pytest.mark.parametrize("settings", list(SETTINGS))
def test_a_model_drafts(settings):
    model, tokenizer = tiny_pair(plain=True)
    ids, passes = prompt_of(tokenizer), []
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 41, "eos_token_id": None}
    torch.manual_seed(1)
    expected = model.generate(ids, **arguments, **SETTINGS[settings])
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    torch.manual_seed(1)
    drafts = DraftModel(copy.deepcopy(model), tokenizer)
    drafted = model.generate(
        ids,
        custom_generate=thoughtformer.speculate,
        drafts=drafts,
        target_tokenizer=tokenizer,
        **arguments,
        **SETTINGS[settings],
    )
    hook.remove()
    assert torch.equal(drafted, expected)
    assert len(passes) == 1 + 8, "the same model is always right"


@pytest.mark.parametrize("settings", ["greedy", "drawn"])
def test_a_plain_causal_lm_takes_a_model_that_drafts(settings):
    """Its ids are the drafter's, whose sentences end by themselves."""
    compressed, tokenizer = compressed_pair("llama", Full())
    model = compressed.model
    compressed.close()
    drafter = DraftModel(*tiny_pair(**KINDS["hourglass"]))  # whose weights are drawn from the same stream
    ids = torch.tensor([tokenizer(PAGE[:90])["input_ids"]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "eos_token_id": None}
    torch.manual_seed(2)
    expected = model.generate(ids, **arguments, **SETTINGS[settings])
    torch.manual_seed(2)
    drafted = model.generate(
        ids,
        custom_generate=thoughtformer.speculate,
        drafts=["suffix", drafter],
        target_tokenizer=tokenizer,
        **arguments,
        **SETTINGS[settings],
    )
    assert torch.equal(drafted, expected)


def test_a_drafter_that_fails_is_left_out_with_one_warning(caplog):
    model, tokenizer = tiny_pair(plain=True)
    ids = prompt_of(tokenizer)
    with caplog.at_level(logging.WARNING, logger="thoughtformer"):
        model.generate(ids, custom_generate=thoughtformer.speculate, drafts=Strange(), max_new_tokens=9)
    assert [record.message for record in caplog.records] == ["Strange drafts no more"]


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"num_beams": 2}, UnsupportedError, "num_beams=2"),
        ({"use_cache": False}, UnsupportedError, "need a cache"),
        ({"return_dict_in_generate": True, "output_scores": True}, UnsupportedError, "output_scores"),
        ({"drafts": "sufix"}, InputError, "Did you mean 'suffix'"),
        ({"drafts": "model:tiny-gpthf"}, InputError, "needs target_tokenizer="),
        ({"num_return_sequences": 2, "do_sample": True}, UnsupportedError, "one row, not 2"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(more, error, message):
    model, tokenizer = tiny_pair(plain=True)
    ids = prompt_of(tokenizer)
    with pytest.raises(error, match=message):
        model.generate(ids, custom_generate=thoughtformer.speculate, max_new_tokens=3, **more)


def test_caches_of_transformers_are_refused():
    model, ids = tiny_lm("llama"), prompt_of(None)
    for more, message in (
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({CACHE_NAME: DynamicCache(config=model.config)}, "leave it out"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            model.generate(ids, custom_generate=thoughtformer.speculate, max_new_tokens=3, **more)


def test_what_cannot_be_taken_back_is_refused():
    rereading = next(method for _, method in SERVED.values() if method.can_reread)
    model = compress(tiny_lm("llama"), rereading)
    ids = prompt_of(None)
    with pytest.raises(UnsupportedError, match="overwrites what it drops"):
        model.generate(ids, custom_generate=thoughtformer.speculate, max_new_tokens=3)

"""transformers' generate, the naive loop, the engine alone and the engine in a batch write the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from conftest import VISIBILITIES
from prose import KINDS, PAGE, prose, tiny_pair
from thoughtformer.engine import Engine
from thoughtformer.engine.batch import Batch
from thoughtformer.engine.request import make_request
from thoughtformer.errors import ContextOverflowError, InputError
from thoughtformer.runners.opening import runner_of
from thoughtformer.sampling import SamplingParams

PROMPTS = [PAGE[:300], "", "The ferry", PAGE[300:420], "Wait. What is it? She"]


def naive_greedy(model, ids: list[int], new_tokens: int) -> list[int]:
    """Recomputes the whole text for every token."""
    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
    return ids[start:]


def pair(visibility: str, **changes):
    if visibility == "hourglass":
        return tiny_pair(body_visibility="fast", num_decoder_layers=2, **changes)
    if visibility == "causal":
        return tiny_pair(body_visibility="causal", **changes)
    return tiny_pair(**KINDS[visibility] | changes)


@pytest.mark.parametrize("visibility", [*VISIBILITIES, "plain"])
def test_greedy_tokens_are_identical(visibility):
    model, tokenizer = pair(visibility)
    engine = Engine(model, tokenizer, max_rows=3)
    params = SamplingParams(max_new_tokens=40)
    together = engine.generate(PROMPTS, params)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    generated = model.generate(**batch, max_new_tokens=40, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        expected = naive_greedy(model, ids, 40)
        assert together[number].ids == expected
        assert engine.generate([prompt], params)[0].ids == expected
        assert generated[number].tolist()[: len(expected)] == expected
        alone = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
        assert alone.tolist() == expected


def test_ends_occur_and_sentences_close():
    """The comparisons above are worth something: random models do close sentences, by choice and by force."""
    model, tokenizer = tiny_pair(max_sentence_tokens=12)
    done = Engine(model, tokenizer).generate([PAGE[:100]], SamplingParams(max_new_tokens=60))[0]
    end = model.config.sentence_end_token_id
    assert done.usage.new_sentence_ends == done.ids.count(end) >= 4
    assert all(not (a == end and b == end) for a, b in zip(done.ids, done.ids[1:]))


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_beams_equal_beams_without_cache(visibility):
    model, tokenizer = pair(visibility)
    batch = tokenizer(PROMPTS[2:], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    cached = model.generate(**batch, **settings)
    recomputed = model.generate(**batch, **settings, use_cache=False)
    assert cached.tolist() == recomputed.tolist()


@torch.inference_mode()
def test_sampling_follows_the_same_distribution():
    """The engine's scores are transformers' scores, for all settings together; so is a seeded choice."""
    model, tokenizer = tiny_pair()
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3}
    ids = torch.tensor([tokenizer(PAGE[:200])["input_ids"]])
    generated = model.generate(
        ids, do_sample=True, max_new_tokens=12, return_dict_in_generate=True, output_scores=True, **settings
    )
    runner = runner_of(model, tokenizer)
    request = make_request(runner, ids[0].tolist(), SamplingParams(max_new_tokens=12, **settings), number=0)
    logits, cache = Batch(runner).read([request])
    for scores, token in zip(generated.scores, generated.sequences[0, ids.shape[1] :].tolist()):
        torch.testing.assert_close(request.sampler.scores(request.ids, logits[0]), scores[0], rtol=1e-5, atol=1e-5)
        request.ids.append(token)
        logits = runner.step([token], cache).float()


def test_sampled_rows_do_not_depend_on_neighbours():
    model, tokenizer = tiny_pair()
    engine = Engine(model, tokenizer)
    params = [SamplingParams(max_new_tokens=25, temperature=1.0, seed=seed) for seed in range(len(PROMPTS))]
    together = engine.generate(PROMPTS, params)
    for prompt, param, done in zip(PROMPTS, params, together):
        assert engine.generate([prompt], param)[0].ids == done.ids
    again = engine.generate([PROMPTS[0]] * 2, [params[0], SamplingParams(max_new_tokens=25, temperature=1.0, seed=9)])
    assert again[0].ids == together[0].ids != again[1].ids


def test_repetition_penalty_spares_ends_in_both():
    model, tokenizer = tiny_pair()
    end = model.config.sentence_end_token_id
    ids = torch.tensor([tokenizer(prose(400))["input_ids"]])
    assert (ids == end).sum() > 2
    with torch.no_grad():
        logits = model(ids).logits[:, -1].float()
    config = GenerationConfig(repetition_penalty=5.0)
    scores = model._get_logits_processor(config, ids.shape[1], device="cpu")(ids, logits.clone())
    assert scores[0, end] == logits[0, end]
    assert scores[0, model.config.bos_token_id] == logits[0, model.config.bos_token_id]
    seen = ids[0, ids[0] > 2][0]
    assert scores[0, seen] < logits[0, seen]
    params = SamplingParams(max_new_tokens=30, repetition_penalty=5.0)
    done = Engine(model, tokenizer).generate([ids[0].tolist()], params)[0]
    generated = model.generate(ids, max_new_tokens=30, repetition_penalty=5.0, do_sample=False)
    assert generated[0, ids.shape[1] :].tolist() == done.ids


def test_streaming_gives_the_same_text():
    model, tokenizer = tiny_pair()
    engine, params = Engine(model, tokenizer), SamplingParams(max_new_tokens=60, temperature=1.5, seed=0)
    streamed = dict.fromkeys(range(len(PROMPTS)), "")
    for event in engine.stream(PROMPTS, params):
        streamed[event.row] += event.text
    for number, done in enumerate(engine.generate(PROMPTS, params)):
        assert streamed[number] == done.text == tokenizer.decode(done.ids)


def test_stop_strings_are_never_shown():
    model, tokenizer = tiny_pair()
    engine = Engine(model, tokenizer)
    free = engine.generate([PAGE[:80]], SamplingParams(max_new_tokens=60))[0]
    stop = free.text[10:14]
    stopped = engine.generate([PAGE[:80]], SamplingParams(max_new_tokens=60, stop=["nowhere", stop]))[0]
    assert stopped.finish_reason == "stop_string"
    assert stopped.text == free.text[: free.text.index(stop)]
    shown = "".join(e.text for e in engine.stream([PAGE[:80]], SamplingParams(max_new_tokens=60, stop=[stop])))
    assert shown == stopped.text


def test_transformers_streamer_and_pipeline():
    model, tokenizer = tiny_pair()
    expected = Engine(model, tokenizer).generate([PAGE[:80]], SamplingParams(max_new_tokens=20))[0].text
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**tokenizer(PAGE[:80], return_tensors="pt"), max_new_tokens=20, do_sample=False, streamer=streamer)
    assert "".join(streamer) == expected
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    result = generate(PAGE[:80], max_new_tokens=20, do_sample=False, return_full_text=False)
    assert result[0]["generated_text"] == expected


def test_several_turns_on_one_cache():
    model, tokenizer = tiny_pair()
    first = torch.tensor([tokenizer(PAGE[:120])["input_ids"]])
    turn = model.generate(first, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    more = torch.tensor([tokenizer(PAGE[120:200], add_special_tokens=False)["input_ids"]])
    whole = torch.cat([turn.sequences, more], dim=1)
    continued = model.generate(whole, cache=turn.cache, max_new_tokens=9, do_sample=False)
    assert continued.tolist() == model.generate(whole, max_new_tokens=9, do_sample=False).tolist()


def test_chunked_prefill_of_transformers():
    model, tokenizer = tiny_pair()
    ids = torch.tensor([tokenizer(PAGE[:400])["input_ids"]])
    chunked = model.generate(ids, max_new_tokens=9, do_sample=False, prefill_chunk_size=13)
    assert chunked.tolist() == model.generate(ids, max_new_tokens=9, do_sample=False).tolist()


def test_assisted_decoding_is_refused():
    model, tokenizer = tiny_pair()
    batch = tokenizer("The ferry", return_tensors="pt")
    with pytest.raises(ValueError, match="stateful"):
        model.generate(**batch, max_new_tokens=5, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(**batch, max_new_tokens=5, assistant_model=tiny_pair()[0])


def test_texts_past_the_trained_length_are_refused_before_work_starts():
    model, tokenizer = tiny_pair(max_position_embeddings=40)
    ids = tokenizer("one two three")["input_ids"]
    room = 40 - len(ids)
    engine = Engine(model, tokenizer)
    assert len(engine.generate([ids], SamplingParams(max_new_tokens=room))[0].ids) <= room
    with pytest.raises(ContextOverflowError, match=rf"Ask for {room} new tokens at most"):
        engine.generate([ids], SamplingParams(max_new_tokens=room + 1))
    with pytest.raises(ContextOverflowError, match="Shorten the prompt"):
        engine.generate([PAGE], SamplingParams(max_new_tokens=1))
    with pytest.raises(ContextOverflowError, match="Lower max_new_tokens by 1"):
        model.generate(torch.tensor([ids]), max_new_tokens=room + 1)
    model.config.allow_extrapolation = True
    assert engine.generate([ids], SamplingParams(max_new_tokens=room + 9))[0].usage.prompt_tokens == len(ids)


def test_timed_runs_ignore_the_end_of_text():
    """A model that would stop at once writes as many tokens as asked for."""
    model, tokenizer = tiny_pair()
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits equal: the likeliest is id 0, the end of text
    engine = Engine(model, tokenizer)
    assert engine.generate(["a"], SamplingParams(max_new_tokens=9))[0].finish_reason == "end_of_text"
    done = engine.generate(["a"], SamplingParams(max_new_tokens=9, ignore_end_of_text=True))[0]
    assert (len(done.ids), done.finish_reason) == (9, "length")
    assert model.config.bos_token_id not in done.ids


def test_cache_bytes_fall_when_rows_finish():
    model, tokenizer = tiny_pair(plain=True)
    params = [SamplingParams(max_new_tokens=count) for count in (2, 50)]
    done = Engine(model, tokenizer).generate([PAGE[:500], "The"], params)
    assert done[1].cache_bytes < done[0].cache_bytes / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": 1.0}, "min_p=1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"seed": 1 << 63}, "seed=9223372036854775808"),
        ({"stop_token_ids": 3}, "list of token ids"),
        ({"stop_token_ids": [-1]}, "list of token ids"),
        ({"stop": "abc"}, "list of strings"),
        ({"stop": [""]}, "none of them empty"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**arguments)


def test_prompts_that_cannot_be(tmp_path):
    engine = Engine(*tiny_pair())
    for prompts, message in (("text", "one string"), ([[]], "no tokens"), ([[0, 10**6]], "outside")):
        with pytest.raises(InputError, match=message):
            engine.generate(prompts)
    with pytest.raises(InputError, match="2 sampling params for 1"):
        engine.generate(["a"], [SamplingParams(), SamplingParams()])
    with pytest.raises(InputError, match="max_rows"):
        Engine(*tiny_pair(), max_rows=0)
    with pytest.raises(InputError, match="model is 'tiny-gpthf': load it first"):
        Engine("tiny-gpthf", tiny_pair()[1])

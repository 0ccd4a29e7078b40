"""transformers' own generate over a compressed model: greedy, sampled, beams, turns, padding; and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from lms import DIFFERENT, FIRST_SETTINGS, TINY_METHODS, random_ids, tiny_compressed, tiny_lm
from prose import tiny_pair
from thoughtformer import compress
from thoughtformer.compression import ByteBudget, EntryBudget, Local, SentenceEnds, Sentinel
from thoughtformer.errors import ConfigError, ContextOverflowError, InputError, UnsupportedError
from thoughtformer.models.transformers_api import CACHE_NAME

GREEDY = {"do_sample": False, "max_new_tokens": 25}


def naive_greedy(compressed, ids, num_tokens):
    """The whole text read anew for every token."""
    for _ in range(num_tokens):
        ids = torch.cat([ids, compressed(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("name", sorted(FIRST_SETTINGS))
@torch.no_grad()
def test_greedy(name):
    compressed = tiny_compressed(tiny_lm(), TINY_METHODS[name])
    ids = random_ids(2, 30)
    assert torch.equal(compressed.generate(ids, **GREEDY), naive_greedy(compressed, ids, 25))


@pytest.mark.parametrize("family", DIFFERENT)
@torch.no_grad()
def test_padded_batches_and_turns(family):
    """Left-padded rows equal rows alone; a further turn on the returned cache equals one long text."""
    compressed = tiny_compressed(tiny_lm(family), TINY_METHODS["sentinel"])
    ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :13] = 0
    output = compressed.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    for row, padding in enumerate((13, 0)):
        alone = compressed.generate(ids[row : row + 1, padding:], **GREEDY)
        assert torch.equal(output.sequences[row, padding:], alone[0])

    more = torch.cat([output.sequences, random_ids(2, 8, seed=5)], dim=1)
    more_mask = torch.cat([mask, torch.ones(2, more.shape[1] - 30, dtype=torch.long)], dim=1)
    again = compressed.generate(more, attention_mask=more_mask, cache=output.cache, **GREEDY)
    for row, padding in enumerate((13, 0)):
        # Without a mask transformers would take generated tokens with the padding's id for padding.
        alone = more[row : row + 1, padding:]
        expected = compressed.generate(alone, attention_mask=torch.ones_like(alone), **GREEDY)
        assert torch.equal(again[row, padding:], expected[0])


@pytest.mark.parametrize("name", ["sentinel", "sentinel_earlier", "local", "h2o", "combiner", "streaming"])
@torch.no_grad()
def test_beams_and_sampling(name):
    """Beams on the cache equal beams without one; sampling is the model's distribution under the same stream."""
    compressed = tiny_compressed(tiny_lm(), TINY_METHODS[name])
    ids = random_ids(2, 30)
    beams = compressed.generate(ids, num_beams=3, do_sample=False, max_new_tokens=12)
    assert torch.equal(
        beams, compressed.generate(ids, num_beams=3, do_sample=False, max_new_tokens=12, use_cache=False)
    )
    torch.manual_seed(3)
    sampled = compressed.generate(ids, do_sample=True, temperature=0.9, top_k=0, max_new_tokens=12)
    torch.manual_seed(3)
    again = compressed.generate(ids, do_sample=True, temperature=0.9, top_k=0, max_new_tokens=12, use_cache=False)
    assert torch.equal(sampled, again)
    several = compressed.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=5)
    assert several.shape == (6, 35)


@torch.no_grad()
def test_what_can_not_be_exact_is_refused():
    compressed = tiny_compressed(tiny_lm(), TINY_METHODS["sentinel"])
    ids = random_ids(1, 30)
    with pytest.raises(ValueError, match="stateful"):
        compressed.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=5)
    with pytest.raises(ValueError, match="stateful"):
        compressed.generate(ids, assistant_model=tiny_lm(), max_new_tokens=5)
    cache = compressed.new_cache(1)
    with pytest.raises(UnsupportedError, match="gone"):
        cache.crop(-1)
    assert not cache.is_croppable
    with pytest.raises(UnsupportedError, match="compressed"):
        compressed.model(ids, **{CACHE_NAME: cache})
    with pytest.raises(UnsupportedError, match="static"):
        compressed.generate(ids, cache_implementation="static", max_new_tokens=5)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        compressed(ids, output_attentions=True)
    with pytest.raises(UnsupportedError, match="position_ids"):
        compressed(ids, position_ids=torch.arange(5, 35)[None])
    with pytest.raises(InputError, match="input_ids"):
        compressed(None)
    compressed.close()
    with pytest.raises(InputError, match="closed"):
        compressed(ids)


def test_wrong_settings_are_refused():
    model = tiny_lm()
    with pytest.raises(ConfigError, match="Did you mean 'sentinel'"):
        compress(model, "sentinels")
    with pytest.raises(ConfigError, match="removed"):
        compress(model, "local", remove=0.5)
    with pytest.raises(ConfigError, match="needs an adapter"):
        compress(model, "sentinel")
    with pytest.raises(ConfigError, match="no adapter"):
        compress(model, "local", adapter="tiny-gpt-sentinel")
    with pytest.raises(ConfigError, match="gathered"):
        compress(model, "full", execution="gatherd")
    with pytest.raises(ConfigError, match="below 1"):
        Local(removed=1.0)


@torch.no_grad()
def test_budgets_and_sentences():
    """Policies hold what they promise at every step, and reading at once folds alike."""
    model = tiny_lm()
    ids = random_ids(1, 100)
    per_entry = 2 * 3 * 2 * 8 * 8  # keys and values, layers, heads, width, float64
    for chosen in (
        ByteBudget(max_bytes=40 * per_entry, span_tokens=8, recent_tokens=4, start_tokens=0),
        SentenceEnds(end_ids=frozenset({7, 9, 21}), min_tokens=3, max_tokens=12, recent_tokens=4, start_tokens=0),
    ):
        compressed = tiny_compressed(model, Sentinel(policy=chosen))
        at_once = compressed(ids, use_cache=False).logits
        cache, steps, held = compressed.new_cache(1), [], []
        for column in range(100):
            steps.append(compressed(ids[:, [column]], cache=cache).logits)
            held.append(cache.live_bytes(per_entry))
        torch.testing.assert_close(torch.cat(steps, dim=1), at_once, rtol=0, atol=1e-9)
        assert max(held) <= 40 * per_entry
        compressed.close()
    with pytest.raises(ConfigError, match=f"at least {24 * per_entry}"):
        tiny_compressed(model, Sentinel(policy=ByteBudget(max_bytes=per_entry, span_tokens=4)))


@torch.no_grad()
def test_an_exhausted_budget_says_so():
    budget = EntryBudget(max_entries=20, span_tokens=4, recent_tokens=4, first_tokens=2, start_tokens=0)
    compressed = tiny_compressed(tiny_lm(), Sentinel(policy=budget))
    cache = compressed.new_cache(1)
    with pytest.raises(ContextOverflowError, match="max_entries=20"):
        compressed(random_ids(1, 100), cache=cache)
    assert cache.num_tokens.tolist() == [0]


def test_pipelines_and_streamers():
    model, tokenizer = tiny_pair(plain=True)
    with compress(model, Local(removed=0.5)) as compressed:
        writer = pipeline("text-generation", model=compressed, tokenizer=tokenizer)
        text = writer("The sea was", max_new_tokens=8, do_sample=False)[0]["generated_text"]
        assert text.startswith("The sea was")
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        inputs = tokenizer("The sea was", return_tensors="pt")
        output = compressed.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
        assert "".join(streamer) == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

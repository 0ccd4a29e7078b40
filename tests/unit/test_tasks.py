"""Generated texts that ask for what they said: their answers are in them, and scores are what they claim."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch

from lms import compressed_pair
from prose import tiny_pair
from thoughtformer.compression import Full, Local, compress
from thoughtformer.errors import ConfigError
from thoughtformer.evaluate.tasks import TASKS, TaskScore, make_texts, score_texts, summarise_tasks
from thoughtformer.text.plain import document_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return document_tokenizer(tiny_pair(plain=True)[1])


def texts_of(task, tokenizer, **settings):
    made = make_texts(task, tokenizer, **{"num_tokens": 900, "num_texts": 6, "seed": 1} | settings)
    decoded = []
    for text in made:
        start = getattr(tokenizer, "bos_token_id", None)
        ids = [token for token in text.ids if token != start]
        decoded.append((tokenizer.decode(ids[: -text.num_answer]), tokenizer.decode(text.ids[-text.num_answer :])))
    return made, decoded


def answered(task: str, text: str) -> str:
    """The answer, found by reading."""
    if task == "aggregation":
        return Counter(re.findall(r"Sold: one (\w+)\.", text)).most_common(1)[0][0]
    if task == "read_again":
        first, again = re.findall(r"The list reads: ([\w ]+)", text)
        assert first.startswith(again)
        return first[len(again) :].strip()
    asked = re.findall(r"the secret word of the (\w+) is$", text)[0]
    said = re.findall(rf"The secret word of the {asked} is (?:that of the \w+, which is )?(\w+)\.", text)
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize("task", list(TASKS))
def test_answers_are_in_the_texts(task, tokenizer):
    made, decoded = texts_of(task, tokenizer)
    for text, (asked, answer) in zip(made, decoded, strict=True):
        assert answer.startswith(" ")
        assert answer.strip() == answered(task, asked)
        assert 800 < len(text.ids) <= 900
    assert len({answer for _, answer in decoded}) > 2
    # Chance alone isn't enough: nothing else is asked of what stands right before the question.
    assert len({asked.split("As was said")[0][-40:] for asked, _ in decoded}) > 2


def test_facts_lie_anywhere(tokenizer):
    _, decoded = texts_of("planted_fact", tokenizer, num_texts=30)
    places = [asked.index("The secret word") / len(asked) for asked, _ in decoded]
    assert min(places) < 0.2
    assert 0.6 < max(places) < 0.95


@pytest.mark.parametrize("task", list(TASKS))
def test_texts_are_the_same_again(task, tokenizer):
    many = make_texts(task, tokenizer, num_tokens=500, num_texts=4, seed=3)
    assert make_texts(task, tokenizer, num_tokens=500, num_texts=2, seed=3) == many[:2]
    assert make_texts(task, tokenizer, num_tokens=500, num_texts=2, seed=4) != many[:2]


def test_mistakes(tokenizer):
    with pytest.raises(ConfigError, match=r"unknown task 'variable'.*Did you mean 'variables'"):
        make_texts("variable", tokenizer, num_tokens=500, num_texts=1)
    with pytest.raises(ConfigError, match=r"aggregation takes \d+ tokens at least, more than 50"):
        make_texts("aggregation", tokenizer, num_tokens=50, num_texts=1)


@torch.no_grad()
def test_scores_are_the_models_own():
    compressed, tokenizer = compressed_pair("llama", Full())
    texts = make_texts("several_keys", document_tokenizer(tokenizer), num_tokens=500, num_texts=3)
    for text, score in zip(texts, score_texts(compressed, texts), strict=True):
        logits = compressed.model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        chosen = [float(logits[place - 1, text.ids[place]]) for place in range(-text.num_answer, 0)]
        assert score.loss_nats == pytest.approx(-sum(chosen) / len(chosen), abs=1e-5)
        assert score.is_right == all(
            int(logits[place - 1].argmax()) == text.ids[place] for place in range(-text.num_answer, 0)
        )
        # And right where the likeliest is the answer.
        likeliest = [int(token) for token in logits[-text.num_answer - 1 : -1].argmax(-1)]
        answer = type(text)(task="", ids=[*text.ids[:-1], likeliest[-1]], num_answer=1)
        assert score_texts(compressed, [answer])[0].is_right
    with compress(compressed.model, Local(removed=0.9)) as small:
        assert score_texts(small, texts) != score_texts(compressed, texts)


def test_summaries_are_paired():
    full = [TaskScore(is_right=right, loss_nats=loss) for right, loss in ((True, 1.0), (True, 2.0), (False, 6.0))]
    ours = [TaskScore(is_right=right, loss_nats=loss) for right, loss in ((True, 1.5), (False, 2.5), (True, 6.5))]
    summary = summarise_tasks(ours, full)
    assert summary == {
        "right": pytest.approx(2 / 3),
        "full_right": pytest.approx(2 / 3),
        "right_of_full": 0.5,
        "loss_nats": pytest.approx(3.5),
        "above_full_nats": 0.5,
        "above_full_error": 0.0,
        "num_texts": 3,
    }
    assert math.isnan(summarise_tasks(ours[:1], full[2:])["right_of_full"])

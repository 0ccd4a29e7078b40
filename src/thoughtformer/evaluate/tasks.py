"""What a context must be kept for: facts, keys, variables, passages and counts, in texts of any length.

The kinds are those of RULER (Hsieh et al., arXiv 2404.06654), on records that are generated with a seed, for any
tokenizer; models without instruction can do them, because each text ends with the beginning of its answer's sentence.
A text's answer is scored as it stands: whether each of its tokens is the likeliest, and how unlikely it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from thoughtformer.compression.model import CompressedModel
from thoughtformer.errors import ConfigError, nearest

__all__ = ["TASKS", "TaskScore", "TaskText", "make_texts", "score_texts", "summarise_tasks"]

PEOPLE = (
    "the baker", "the old sailor", "my aunt", "the teacher", "a neighbour", "the young doctor", "the gardener",
    "the postman", "her brother", "the clockmaker", "a painter", "the miller", "the judge", "our guide", "the cook",
)  # fmt: skip
DOINGS = (
    "walked along the river", "looked for the key", "closed the window", "told a long story", "waited at the station",
    "counted the boxes", "wrote a letter", "repaired the roof", "went to the market", "fed the horses",
    "drew a map", "lit the lamp", "read the newspaper", "crossed the bridge", "swept the yard",
)  # fmt: skip
TIMES = (
    "in the morning", "before the rain", "late at night", "on a cold day", "after supper", "without a word",
    "for the second time", "as every week", "while the others slept", "in the end",
)  # fmt: skip
PLACES = (
    "harbour", "mill", "library", "castle", "station", "bakery", "garden", "chapel", "theatre", "museum", "tower",
    "market", "bridge", "school", "forest", "island", "palace", "prison", "hotel", "cellar",
)  # fmt: skip
WORDS = (
    "lantern", "copper", "violin", "meadow", "thunder", "basket", "candle", "pepper", "marble", "saddle", "button",
    "feather", "ladder", "pillow", "ribbon", "hammer", "kettle", "needle", "orange", "silver", "velvet", "walnut",
    "window", "winter", "anchor", "barrel", "cotton", "dragon", "engine", "falcon", "ginger", "helmet",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TaskText:
    """Ids that end with an answer of so many tokens."""

    task: str
    ids: list[int]
    num_answer: int


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What a model makes of one text's answer.

    Attributes:
        is_right: each token of the answer is the likeliest, given those before it.
        loss_nats: mean over its tokens.
    """

    is_right: bool
    loss_nats: float


class _Story:
    """Sentences of no consequence, without end."""

    def __init__(self, chooser: np.random.Generator) -> None:
        self.chooser = chooser

    def pick(self, words: Sequence[str]) -> str:
        return words[int(self.chooser.integers(len(words)))]

    def sample(self, words: Sequence[str], number: int) -> list[str]:
        """Different ones."""
        return [words[int(place)] for place in self.chooser.permutation(len(words))[:number]]

    def sentence(self) -> str:
        text = f"{self.pick(PEOPLE)} {self.pick(DOINGS)} {self.pick(TIMES)}."
        return text[0].upper() + text[1:]

    def among(self, facts: Sequence[str], num_sentences: int, *, last: float = 1.0) -> str:
        """So many sentences with facts among them in their order, none behind this fraction of them."""
        sentences = [self.sentence() for _ in range(num_sentences)]
        places = np.sort(self.chooser.integers(0, int(num_sentences * last) + 1, len(facts)))
        for place, fact in reversed(list(zip(places.tolist(), facts, strict=True))):
            sentences.insert(place, fact)
        return " ".join(sentences)


#: A text up to its answer, and the answer, of so many sentences of no consequence.
Make = Callable[[_Story, int], tuple[str, str]]


def planted_fact(story: _Story, num_sentences: int) -> tuple[str, str]:
    """One fact anywhere in the first nine tenths."""
    place, word = story.pick(PLACES), story.pick(WORDS)
    text = story.among([f"The secret word of the {place} is {word}."], num_sentences, last=0.9)
    return f"{text} As was said, the secret word of the {place} is", f" {word}"


def several_keys(story: _Story, num_sentences: int) -> tuple[str, str]:
    """Eight facts of one form, one of which is asked for."""
    places, words = story.sample(PLACES, 8), story.sample(WORDS, 8)
    facts = [f"The secret word of the {place} is {word}." for place, word in zip(places, words, strict=True)]
    asked = int(story.chooser.integers(8))
    text = story.among(facts, num_sentences, last=0.9)
    return f"{text} As was said, the secret word of the {places[asked]} is", f" {words[asked]}"


def variables(story: _Story, num_sentences: int) -> tuple[str, str]:
    """A word that is handed on through three places, beside another chain."""
    places, words = story.sample(PLACES, 6), story.sample(WORDS, 2)
    facts = []
    for step in range(3):
        for place, word in ((places[step], words[0]), (places[step + 3], words[1])):
            before = places[places.index(place) - 1]
            of_before = f"that of the {before}, which is {word}" if step else word
            facts.append(f"The secret word of the {place} is {of_before}.")
    text = story.among(facts, num_sentences, last=0.9)
    asked = int(story.chooser.integers(2))
    return f"{text} As was said, the secret word of the {places[2 + 3 * asked]} is", f" {words[asked]}"


def read_again(story: _Story, num_sentences: int) -> tuple[str, str]:
    """A passage of random words, begun again at the end."""
    words = [story.pick(WORDS) for _ in range(16)]
    passage = f"The list reads: {' '.join(words)}."
    text = story.among([passage], num_sentences, last=0.9)
    return f"{text} Once more. The list reads: {' '.join(words[:4])}", f" {' '.join(words[4:])}"


def aggregation(story: _Story, num_sentences: int) -> tuple[str, str]:
    """Records of four kinds, one of which is several times as frequent."""
    kinds = story.sample(WORDS, 4)
    number = max(num_sentences // 4, 8)
    counts = [number // 2, number // 6, number // 6, number // 6]
    records = [f"Sold: one {kind}." for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    records = [records[int(place)] for place in story.chooser.permutation(len(records))]
    text = story.among(records, max(num_sentences - len(records), 0))
    return f"{text} What was sold most often is the", f" {kinds[0]}"


TASKS: dict[str, Make] = {
    "planted_fact": planted_fact,
    "several_keys": several_keys,
    "variables": variables,
    "read_again": read_again,
    "aggregation": aggregation,
}


def make_texts(task: str, tokenizer: Any, *, num_tokens: int, num_texts: int, seed: int = 0) -> list[TaskText]:
    """Texts of a task, each as long as fits.

    Args:
        task: of `TASKS`.
        tokenizer: of documents.
        num_tokens: of a text with its answer, at most.
        num_texts: how many.
        seed: of the draw; a text is the same whatever the number of texts.

    Raises:
        ConfigError: an unknown task, or texts too short for it.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}.{nearest(task, TASKS)}")
    return [_fitting(task, tokenizer, num_tokens, (seed, number)) for number in range(num_texts)]


def _fitting(task: str, tokenizer: Any, num_tokens: int, seed: tuple[int, int]) -> TaskText:
    def made(num_sentences: int) -> TaskText:
        # The same draw for any length: facts are drawn before what is between them.
        story = _Story(np.random.default_rng([*seed, list(TASKS).index(task)]))
        text, answer = TASKS[task](story, num_sentences)
        ids = [int(token) for token in tokenizer.encode_document(text, complete=False)]
        answer_ids = [int(token) for token in tokenizer.encode_document(answer, complete=False, start=False)]
        return TaskText(task=task, ids=[*ids, *answer_ids], num_answer=len(answer_ids))

    fewest, most = 8, 8
    if len(made(fewest).ids) > num_tokens:
        raise ConfigError(
            f"{task} takes {len(made(fewest).ids)} tokens at least, more than {num_tokens}: take longer texts."
        )
    while len(made(most).ids) <= num_tokens:
        fewest, most = most, 2 * most
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (middle, most) if len(made(middle).ids) <= num_tokens else (fewest, middle)
    return made(fewest)


@torch.inference_mode()
def score_texts(compressed: CompressedModel, texts: Sequence[TaskText]) -> list[TaskScore]:
    """What the model under its method makes of each text's answer."""
    scores = []
    for text in texts:
        ids = torch.tensor([text.ids])
        real = torch.ones_like(ids, dtype=torch.bool)
        wanted = torch.zeros_like(real)
        wanted[:, -1 - text.num_answer : -1] = True
        logits = compressed.backbone.logits(compressed.read(ids, real, None, wanted=wanted)).float()
        answer = ids[0, -text.num_answer :].to(logits.device)
        scores.append(
            TaskScore(
                is_right=bool((logits.argmax(dim=-1) == answer).all()),
                loss_nats=float(F.cross_entropy(logits, answer)),
            )
        )
    return scores


def summarise_tasks(scores: Sequence[TaskScore], full: Sequence[TaskScore]) -> dict[str, float]:
    """Means over the texts, and what they are above those of full attention on the same texts, with standard errors.

    Returns:
        right, loss_nats; full_right, above_full_nats, above_full_error; right_of_full: of the texts that full
        attention gets right, the fraction that is still right (not-a-number if there are none).
    """
    above = np.array([ours.loss_nats - whole.loss_nats for ours, whole in zip(scores, full, strict=True)])
    known = [ours.is_right for ours, whole in zip(scores, full, strict=True) if whole.is_right]
    return {
        "right": float(np.mean([score.is_right for score in scores])),
        "full_right": float(np.mean([score.is_right for score in full])),
        "right_of_full": float(np.mean(known)) if known else float("nan"),
        "loss_nats": float(np.mean([score.loss_nats for score in scores])),
        "above_full_nats": float(above.mean()),
        "above_full_error": float(above.std(ddof=1) / len(above) ** 0.5) if len(above) > 1 else 0.0,
        "num_texts": len(scores),
    }

"""Text for the tests, and a tokenizer and models small enough to make on the spot."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

import torch

import thoughtformer
import twins
from thoughtformer.models import GPTHFConfig, GPTHFForCausalLM
from thoughtformer.rules import BODY_RULES
from thoughtformer.text import SentenceTokenizer, SentencexSplitter, train_bpe

PAGE = (Path(thoughtformer.__file__).parent / "assets" / "page.txt").read_text(encoding="utf-8")


def prose(num_characters: int, *, seed: int = 0) -> str:
    """The page's sentences in random order, in paragraphs of random length."""
    ends = [0, *SentencexSplitter().ends(PAGE)]
    sentences = [PAGE[start:end].strip() for start, end in zip(ends, ends[1:])]
    chooser, parts, length = random.Random(seed), [], 0
    while length < num_characters:
        part = chooser.choice(sentences) + chooser.choice([" ", " ", " ", "\n\n"])
        parts.append(part)
        length += len(part)
    return "".join(parts).rstrip()


#: A GPTHF by each body rule, an hourglass, and a plain GPT: arguments of `tiny_pair`.
KINDS: dict[str, dict[str, object]] = {
    name: {"body_visibility": name} | (twins.RULES[name].settings if name in twins.RULES else {})
    for name in BODY_RULES
    if name != "causal"
} | {
    "hourglass": {"body_visibility": "fast", "num_decoder_layers": 2, "summaries_per_sentence": 2},
    "plain": {"plain": True},
}


@lru_cache
def tiny_tokenizer(insert_sentence_ends: bool = True, max_sentence_tokens: int | None = 64) -> SentenceTokenizer:
    """A byte-level BPE of 400 ids."""
    return SentenceTokenizer.from_backend(
        train_bpe([PAGE], 400), insert_sentence_ends=insert_sentence_ends, max_sentence_tokens=max_sentence_tokens
    )


def tiny_pair(*, plain: bool = False, seed: int = 0, **changes: object) -> tuple[GPTHFForCausalLM, SentenceTokenizer]:
    """A random float64 model with a fitting tokenizer."""
    tokenizer = tiny_tokenizer(not plain)
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_encoder_layers": 0 if plain else 1,
        "num_body_layers": 2,
        "num_attention_heads": 4,
        "body_visibility": "causal" if plain else "hybrid",
        "sentence_end_token_id": None if plain else tokenizer.sentence_end_token_id,
        "max_sentence_tokens": 64,
        "max_position_embeddings": 512,
    }
    model = GPTHFForCausalLM(GPTHFConfig(**(settings | changes))).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
    return model, tokenizer

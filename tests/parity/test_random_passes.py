"""Random models, texts and passes over one cache: however a row was read, every logit is that of reading it at once."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import END, START, VOCAB, close, full_logits, tiny_model
from thoughtformer.cache import GPTHFCache
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.gpthf.known_sentences import SentenceSource
from thoughtformer.rules import BODY_RULES
from thoughtformer.stores.sentences import SentenceStore

TOKENS = 36


def random_model(rng: random.Random) -> GPTHFForCausalLM:
    """Mostly hourglasses, with any of their switches."""
    heads, kv_heads = rng.choice([(4, 4), (4, 2), (2, 1)])
    changes: dict[str, object] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_encoder_layers": rng.choice([1, 2]),
        "body_positions": rng.choice(["token", "sentence"]),
        "body_hidden_size": rng.choice([None, 32]),
        "body_reads_depths": rng.random() < 0.5,
    }
    visibility = rng.choice(["hourglass"] * 5 + [name for name in BODY_RULES if name != "causal"])
    if visibility == "hourglass" or BODY_RULES[visibility].reads_recent:
        changes["recent_sentences"] = rng.choice([0, 0, 1, 2])
    if visibility == "hourglass":
        changes |= {
            "num_decoder_layers": rng.choice([1, 2]),
            "summaries_per_sentence": rng.choice([1, 2, 4]),
            "memory_positions": rng.choice(["sentence", "none"]),
            "ends_read_own_summary": rng.random() < 0.5,
            "decoder_reads_depths": rng.random() < 0.5,
        }
    return tiny_model(visibility, seed=rng.randrange(1000), **changes)


def random_row(rng: random.Random) -> torch.Tensor:
    """Words, ends of sentences, several of them side by side, and a few documents; any of them may come first."""
    ids = [rng.choice([END, END, START, *(rng.randrange(3, VOCAB) for _ in range(6))]) for _ in range(TOKENS)]
    return torch.tensor(ids)


class Rows:
    """Texts that a cache's rows read on, and how far each has come."""

    def __init__(self, model: GPTHFForCausalLM, rng: random.Random, source: SentenceSource | None) -> None:
        self.model, self.rng, self.source = model, rng, source
        # What holds as much in every row takes shortcuts, which one row does always.
        self.num_rows = rng.choice([1, 1, 2, 3])
        self.texts = [random_row(rng) for _ in range(self.num_rows)]
        self.expected = [full_logits(model, text) for text in self.texts]
        self.cache: GPTHFCache = model.new_cache(self.num_rows)
        self.read = [0] * self.num_rows

    def reads_on(self) -> None:
        """A pass of some tokens of each row, none of some; compares the logits that it asks for."""
        rng, longest = self.rng, self.rng.choice([1, 1, 3, 9])
        counts = [min(rng.randint(0, longest), TOKENS - done) for done in self.read]
        if rng.random() < 0.5:
            counts = [min(1, TOKENS - done) for done in self.read]  # a step
        spans = [range(done, done + count) for done, count in zip(self.read, counts, strict=True)]
        ids = torch.tensor([int(self.texts[row][place]) for row, span in enumerate(spans) for place in span])
        if not len(ids):
            return
        kind = rng.choice(["all", "last", "last", "some"])
        wanted = [
            kind == "all" or (kind == "last" and place == span[-1]) or (kind == "some" and rng.random() < 0.3)
            for span in spans
            for place in span
        ]
        row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        asked = torch.tensor(wanted)
        source = self.source if self.cache.autocommit else None
        logits, _ = self.model.ragged_logits(ids.long(), row, self.cache, wanted=asked, sentence_source=source)
        every = torch.cat([self.expected[number][span.start : span.stop] for number, span in enumerate(spans)])
        close(logits, every[asked])
        self.read = [span.stop for span in spans]

    def drafts(self) -> None:
        """Passes that are taken back, or kept in part."""
        before, self.cache.autocommit = list(self.read), False
        for _ in range(self.rng.randint(1, 3)):
            self.reads_on()
        drafted = [now - then for now, then in zip(self.read, before, strict=True)]
        if self.rng.random() < 0.3:
            self.cache.rollback()
            self.read = before
        else:
            kept = [self.rng.randint(0, count) for count in drafted]
            self.cache.commit(torch.tensor(kept))
            self.read = [then + count for then, count in zip(before, kept, strict=True)]
        self.cache.autocommit = True

    def rearranges(self) -> None:
        """Rows dropped, doubled and swapped, as beams do; or all of them saved and restored."""
        if self.rng.random() < 0.5:
            chosen = [self.rng.randrange(len(self.read)) for _ in range(self.num_rows)]
            self.cache = self.cache.fork_rows(torch.tensor(chosen))
            for name in ("texts", "expected", "read"):
                setattr(self, name, [getattr(self, name)[row] for row in chosen])
        else:
            fresh = self.model.new_cache(self.num_rows)
            fresh.restore_saved(self.cache.saved())
            self.cache = fresh


@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_random_passes(seed, tmp_path):
    rng = random.Random(seed)
    model = random_model(rng)
    with SentenceStore(tmp_path / "store") as store:
        storable = BODY_RULES[model.config.body_visibility].ends_suffice
        source = store.of(model) if storable and rng.random() < 0.5 else None
        rows = Rows(model, rng, source)
        for _ in range(60):
            rng.choice([rows.reads_on, rows.reads_on, rows.reads_on, rows.drafts, rows.rearranges])()
            if min(rows.read) == TOKENS:
                break
        assert max(rows.read) == TOKENS

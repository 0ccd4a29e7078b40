"""Losses of sentence vectors against the same written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import END, START, TEXTS, tiny_model

WEIGHTS = {"rebuild_loss_weight": 0.3, "next_sentence_loss_weight": 0.7}


def losses(model, ids, **changes):
    """The loss with and without the sentences' part."""
    return [model.train(training)(ids, labels=ids, loss_only=True, **changes).loss for training in (True, False)]


@pytest.mark.parametrize("visibility", ["hourglass", "hybrid", "fast"])
def test_sentence_losses_by_hand(visibility):
    """Two rows; the first ends in an open sentence, and the second starts one without an end before it."""
    model = tiny_model(visibility, **WEIGHTS)
    ids = torch.stack([TEXTS["mixed"][:30], TEXTS["two_documents"][:30]])
    ids[0, 25:], ids[1, 0] = 7, 9
    with_sentences, without = losses(model, ids)
    row = torch.arange(2).repeat_interleave(30)
    sentences = model.model(ids.flatten(), row, keep_sentences=True).sentences
    extra, number = model.sentence_losses, 0
    rebuilt, predicted = [], []
    for row_ids in ids.tolist():
        words: list[int] = []
        in_document = False
        for token in row_ids:
            if token == START:  # drops an open sentence, and is one of its own, without words
                words, in_document = [], False
            if token not in (START, END):
                words.append(token)
                continue
            vector, said = sentences.encoder[number], sentences.body[number]
            if words:
                logits = model.lm_head.weight @ extra.norm(extra.rebuild.weight @ vector)
                rebuilt.append(-logits.log_softmax(0)[words].mean())
            if in_document:
                guess = extra.next_sentence.weight @ extra.norm(sentences.body[number - 1])
                cosine = guess @ vector / guess.norm() / vector.norm()
                predicted.append(1 - cosine)
            words, in_document, number = [], True, number + 1
            assert said.shape == vector.shape
    assert number == len(sentences.structure)
    expected = 0.3 * torch.stack(rebuilt).mean() + 0.7 * torch.stack(predicted).mean()
    # Cosines are taken in float32.
    torch.testing.assert_close(with_sentences - without, expected, rtol=0, atol=1e-6)
    assert float(expected.detach()) > 0.1


def test_targets_are_taken_as_given():
    model = tiny_model("hourglass", next_sentence_loss_weight=1.0)
    with_sentences, without = losses(model, TEXTS["mixed"][None])
    (with_sentences - without).backward()
    assert model.sentence_losses.next_sentence.weight.grad.abs().max() > 0
    last_only = tiny_model("hourglass", next_sentence_loss_weight=1.0)
    ids = torch.tensor([[START, 5, END]])
    with_sentences, without = losses(last_only, ids)
    assert math.isfinite(float(with_sentences.detach()))


def test_no_sentence_costs_nothing():
    model = tiny_model("hourglass", **WEIGHTS)
    with_sentences, without = losses(model, torch.tensor([[5, 6, 7, 8]]))
    torch.testing.assert_close(with_sentences, without)


def test_shares_of_a_step_add_up():
    """Accumulated batches weigh sentences as they weigh tokens."""
    model = tiny_model("hourglass", **WEIGHTS)
    ids = TEXTS["mixed"][None]
    whole, plain = losses(model, ids)
    half, half_plain = losses(model, ids, num_items_in_batch=2 * (ids.shape[1] - 1))
    torch.testing.assert_close(2 * (half - half_plain), whole - plain)


def test_transformers_loss_adds_them_too():
    """A plain Trainer of transformers asks for logits, and trains the same objective."""
    model = tiny_model("hourglass", **WEIGHTS).train()
    ids, mask = TEXTS["mixed"][None].repeat(2, 1), torch.ones(2, 70, dtype=torch.long)
    mask[1, 50:] = 0
    labels = ids.masked_fill((mask == 0) | (ids == END), -100)  # adjacent ends can't be
    whole = model(ids, labels=labels, attention_mask=mask).loss
    parts = model(ids, labels=labels, attention_mask=mask, loss_only=True).loss
    torch.testing.assert_close(whole.double(), parts, rtol=0, atol=1e-5)


def test_nothing_is_added_by_default():
    assert tiny_model("hourglass").sentence_losses is None


def test_bf16_autocast_is_near_and_warns_of_nothing():
    """Norms get their own type: torch warns, once a process, of one that gets another and takes a slower way."""
    model = tiny_model("hourglass", **WEIGHTS).float()
    norms, seen = [part for part in model.modules() if isinstance(part, torch.nn.RMSNorm)], set()
    for norm in norms:
        norm.register_forward_pre_hook(lambda part, given: seen.add(given[0].dtype))
    ids = TEXTS["mixed"][None]
    exact = losses(model, ids)
    assert seen == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = losses(model, ids)
    assert seen == {torch.float32}
    torch.testing.assert_close(torch.stack(near), torch.stack(exact), rtol=0.03, atol=0)

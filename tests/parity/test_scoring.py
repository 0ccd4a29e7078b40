"""Losses and bits: every route to a figure gives the same one, and by hand where a hand can."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prose import PAGE, prose, tiny_pair
from thoughtformer.errors import ConfigError, CorpusError
from thoughtformer.evaluate import BitsReport, score_documents
from thoughtformer.evaluate.bits import windows

DOCUMENTS = [prose(2500), PAGE[:333], "One line.", prose(900, seed=3)]


@pytest.mark.parametrize("plain", [False, True])
def test_chunked_loss_equals_cross_entropy(plain, monkeypatch):
    """Loss, each token's loss, and all gradients; the chunk smaller than the text."""
    monkeypatch.setattr("thoughtformer.models.chunked_loss.CHUNK_TOKENS", 7)
    model, tokenizer = tiny_pair(plain=plain, max_sentence_tokens=20)
    tokenizer = type(tokenizer).from_backend(
        tokenizer.backend_tokenizer, insert_sentence_ends=not plain, max_sentence_tokens=20
    )
    batch = tokenizer([PAGE[:200], PAGE[200:300]], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, 5:8] = -100
    results = []
    for loss_only in (False, True):
        model.zero_grad()
        output = model(**batch, labels=labels, loss_only=loss_only)
        output.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        shifted = labels[:, 1:].masked_fill(batch["attention_mask"][:, :-1] == 0, -100)
        if loss_only:
            losses = output.token_losses
        else:
            losses = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), shifted, reduction="none")
        results.append((output.loss.detach(), losses.detach(), gradients))
    # transformers' loss function computes in float32.
    torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-9)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[1][0], results[1][1][shifted != -100].mean(), rtol=0, atol=1e-9)


def test_loss_is_divided_by_the_items_of_the_whole_step():
    model, tokenizer = tiny_pair()
    ids = torch.tensor([tokenizer(PAGE[:100])["input_ids"]])
    mean = model(ids, labels=ids, loss_only=True).loss
    summed = model(ids, labels=ids, loss_only=True, num_items_in_batch=2 * (ids.shape[1] - 1)).loss
    torch.testing.assert_close(summed * 2, mean)


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (50, 49), (50, 1), (512, 256)])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 300])
def test_windows_score_every_token_once(num_tokens, context, stride):
    ids = np.full(num_tokens, 5)
    ids[::7] = 1
    for end in (None, 1):
        scored = []
        for start, first, last in windows(ids, context_tokens=context, stride_tokens=stride, sentence_end_token_id=end):
            assert start < first < last <= start + context
            if end is not None and start and (ids[start - 1 : first - 1] == 1).any():
                assert ids[start - 1] == 1, "a window starts where a sentence does"
            scored += range(first, last)
        assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize("plain", [False, True])
def test_figures_do_not_depend_on_batches(plain):
    model, tokenizer = tiny_pair(plain=plain)
    model = model.float()
    reports = [
        BitsReport.from_scores(
            score_documents(model, tokenizer, DOCUMENTS, context_tokens=64, stride_tokens=32, batch_size=size),
            context_tokens=64,
            stride_tokens=32,
        )
        for size in (1, 3, 100)
    ]
    for report in reports[1:]:
        assert report.bits_per_byte == pytest.approx(reports[0].bits_per_byte, abs=1e-6)
        assert report.token_perplexity == pytest.approx(reports[0].token_perplexity, rel=1e-6)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("document", ["", "a", "\n", "   ", "\ufeff" + PAGE[:300], PAGE[:300].replace(". ", ".\r\n")])
def test_documents_of_little_or_nothing_leave_the_sum_right(plain, document):
    model, tokenizer = tiny_pair(plain=plain)
    alone, both = (
        BitsReport.from_scores(score_documents(model, tokenizer, texts), context_tokens=1, stride_tokens=1)
        for texts in ([PAGE[:500]], [document, PAGE[:500]])
    )
    added = next(score_documents(model, tokenizer, [document]))
    bits = alone.bits_per_byte * alone.num_bytes
    if added.num_bytes:
        bits += added.bits_per_byte * added.num_bytes
    assert both.num_bytes == len((document + PAGE[:500]).encode())
    assert both.bits_per_byte == pytest.approx(bits / both.num_bytes, rel=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_one_window_equals_the_full_forward(plain):
    model, tokenizer = tiny_pair(plain=plain, max_position_embeddings=2000)
    score = next(score_documents(model, tokenizer, [DOCUMENTS[0]]))
    ids = torch.from_numpy(tokenizer.encode_document(DOCUMENTS[0], complete=True))[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    nats = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    assert score.token_bits + score.sentence_end_bits == pytest.approx(float(nats) / math.log(2), abs=1e-6)
    assert score.num_bytes == len(DOCUMENTS[0].encode())
    assert score.num_tokens + score.num_sentence_ends == ids.shape[1] - 1


def test_uniform_model_costs_its_vocabulary():
    """By hand: without the head, every possible token costs log2 of how many are possible."""
    model, tokenizer = tiny_pair(max_sentence_tokens=None)  # forced ends would be certain, not uniform
    tokenizer = type(tokenizer).from_backend(tokenizer.backend_tokenizer, max_sentence_tokens=None)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = next(score_documents(model, tokenizer, [PAGE[:500]]))
    vocab = len(tokenizer)
    ids = tokenizer.encode_document(PAGE[:500], complete=True)
    after_end = int(((ids[:-1] == 1) | (ids[:-1] == 0)).sum())  # there an end is impossible
    expected = after_end * math.log2(vocab - 1) + (score.num_tokens - after_end) * math.log2(vocab)
    assert score.token_bits == pytest.approx(expected)
    assert score.sentence_end_bits == pytest.approx(score.num_sentence_ends * math.log2(vocab))


def test_forced_ends_cost_nothing():
    model, tokenizer = tiny_pair(max_sentence_tokens=10)
    limited = type(tokenizer).from_backend(tokenizer.backend_tokenizer, max_sentence_tokens=10)
    text = "never ending " * 60
    score = next(score_documents(model, limited, [text], context_tokens=40, stride_tokens=20))
    ids = limited.encode_document(text, complete=True)
    assert score.num_sentence_ends == (ids == 1).sum() > 10
    natural = 1  # the document's last sentence may end of itself
    alone = next(score_documents(model, limited, [text], context_tokens=512, stride_tokens=20))
    assert score.sentence_end_bits < natural * 40
    assert alone.sentence_end_bits < natural * 40
    logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0]
    forced = np.flatnonzero(ids == 1).tolist()[:-1]
    assert logits[[i - 1 for i in forced]].log_softmax(-1)[:, 1].abs().max() == 0


def test_wrong_windows_and_no_documents():
    model, tokenizer = tiny_pair()
    with pytest.raises(ConfigError, match="trained for 512"):
        next(score_documents(model, tokenizer, ["a"], context_tokens=513))
    with pytest.raises(ConfigError, match="stride_tokens=9"):
        next(score_documents(model, tokenizer, ["a"], context_tokens=9, stride_tokens=9))
    with pytest.raises(CorpusError, match="no documents"):
        BitsReport.from_scores([], context_tokens=2, stride_tokens=1)

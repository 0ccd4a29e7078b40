"""The same code on CUDA: same logits, same tokens as on the CPU."""

from __future__ import annotations

import pytest
import torch

from conftest import TEXTS, tiny_model
from prose import PAGE, tiny_pair
from thoughtformer.engine import Engine
from thoughtformer.sampling import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_logits_on_cuda_equal_those_on_the_cpu(visibility, text):
    model = tiny_model(visibility)
    with torch.no_grad():
        expected = model(text[None], use_cache=False).logits
        model.to("cuda")
        parallel = model(text[None].cuda(), use_cache=False).logits.cpu()
        cache, steps = model.new_cache(1), []
        for token in text.split(1):
            steps.append(model(token[None].cuda(), cache=cache).logits.cpu())
    torch.testing.assert_close(parallel, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-9)


def test_loss_on_cuda_equals_that_on_the_cpu(visibility):
    model = tiny_model(visibility)
    ids = TEXTS["mixed"][None]
    labels = ids.masked_fill(ids == 1, 5)
    expected = model(ids, labels=labels, loss_only=True).loss
    actual = model.to("cuda")(ids.cuda(), labels=labels.cuda(), loss_only=True).loss.cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_engine_on_cuda_writes_the_same_tokens():
    model, tokenizer = tiny_pair()
    prompts, params = [PAGE[:200], "The ferry"], SamplingParams(max_new_tokens=20)
    expected = [done.ids for done in Engine(model, tokenizer).generate(prompts, params)]
    assert [done.ids for done in Engine(model.to("cuda"), tokenizer).generate(prompts, params)] == expected

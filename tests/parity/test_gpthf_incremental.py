"""The parallel forward and the step-by-step decode are one function, in float64 to 1e-9, for every visibility."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import (
    END,
    PAD,
    START,
    TEXTS,
    check_last_logits_of_pieces,
    chunked_logits,
    close,
    full_logits,
    random_text,
    tiny_model,
)
from thoughtformer.models import GPTHFForCausalLM


def test_gathered_equals_dense_mask(model, text):
    """Attention by structure against the mask that the rule states, all tokens at once."""
    gathered = full_logits(model, text)
    model.set_attn_implementation("eager")
    close(gathered, full_logits(model, text))


def test_step_by_step_equals_parallel(model, text):
    close(chunked_logits(model, text, [1] * len(text)), full_logits(model, text))


@pytest.mark.parametrize("prompt_tokens", [1, 2, 7, 23, 69])
def test_prefill_and_steps_equal_parallel(model, prompt_tokens):
    text = TEXTS["mixed"]
    sizes = [prompt_tokens] + [1] * (len(text) - prompt_tokens)
    close(chunked_logits(model, text, sizes), full_logits(model, text))


@pytest.mark.parametrize("chunk", [2, 5, 33])
def test_chunked_prefill_equals_one_prefill(model, text, chunk):
    sizes = [chunk] * (len(text) // chunk) + ([len(text) % chunk] if len(text) % chunk else [])
    close(chunked_logits(model, text, sizes), full_logits(model, text))


@pytest.mark.parametrize("kept", [1, 2, 9])
def test_last_logits_alone_equal_those_of_all(model, text, kept):
    """Asking for fewer logits lets fewer tokens pass the body; those asked for stay as they are."""
    kept = min(kept, len(text))
    with torch.no_grad():
        output = model(text[None], logits_to_keep=kept, use_cache=True)
        without_cache = model(text[None], logits_to_keep=kept, use_cache=False)
        following = model(text[None, -1:].clone().fill_(9), cache=output.cache)
    expected = full_logits(model, torch.cat([text, torch.tensor([9])]))
    close(output.logits[0], expected[len(text) - kept : -1])
    close(without_cache.logits[0], expected[len(text) - kept : -1])
    close(following.logits[0], expected[-1:])


def test_last_logits_of_pieces(model):
    check_last_logits_of_pieces(model)


@pytest.mark.parametrize("columns", [[40, 3, 17], [9, 9, -1, 2]], ids=["unsorted", "twice"])
def test_logits_at_chosen_columns(model, columns):
    """In the order they are asked for, next to a padded row, too."""
    rows, keep = [TEXTS["mixed"], TEXTS["mixed"][:50]], torch.tensor(columns)
    ids, mask = torch.full((2, 70), PAD), torch.zeros(2, 70, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, 70 - len(row) :], mask[number, 70 - len(row) :] = row, 1
    with torch.no_grad():
        alone = model(rows[0][None], logits_to_keep=keep).logits[0]
        padded = model(ids, attention_mask=mask, logits_to_keep=keep).logits
    close(alone, full_logits(model, rows[0])[keep])
    close(padded[0], alone)
    is_token = (keep % 70) >= 20
    close(padded[1, is_token], full_logits(model, rows[1])[keep[is_token] % 70 - 20])


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch_equals_each_row_alone(model, side):
    """Padded rows, then steps in which rows close sentences at different times."""
    rows = [TEXTS[name] for name in ("mixed", "one_token", "two_documents", "ends_at_end", "no_start")]
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(None, len(row))
        ids[number, place], mask[number, place] = row, 1
    continuations = torch.stack([random_text(20, seed=50 + number)[1:] for number in range(len(rows))])
    assert TEXTS["no_start"][0] != START, "empty slots look like entries of a document without a start"
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
        steps = []
        for column in continuations.split(1, dim=1):
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
            steps.append(model(column, attention_mask=mask, cache=output.cache).logits)
    stepped = torch.cat(steps, dim=1)
    for number, row in enumerate(rows):
        expected = full_logits(model, torch.cat([row, continuations[number]]))
        close(output.logits[number, mask[number, :longest].bool()], expected[: len(row)])
        close(stepped[number], expected[len(row) :])


@pytest.mark.parametrize(
    "rows",
    [
        [TEXTS["mixed"], TEXTS["adjacent_ends"], TEXTS["long_sentence"]],
        [torch.tensor([START]), torch.tensor([START])],
        [torch.tensor([START, 5, 6]), torch.tensor([START, 7, END])],
        [torch.tensor([5, 6]), torch.tensor([7, 8])],
    ],
    ids=["mixed", "starts", "short", "openings"],
)
def test_row_does_not_depend_on_neighbours(model, rows):
    """Ragged prefill without padding, next to others and alone."""
    row = torch.cat([torch.full((len(ids),), number) for number, ids in enumerate(rows)])
    with torch.no_grad():
        together, _ = model.ragged_logits(torch.cat(rows), row, model.new_cache(len(rows)))
    for number, ids in enumerate(rows):
        close(together[row == number], full_logits(model, ids))


@pytest.mark.parametrize("new", [END, START, 11], ids=["to_end", "to_start", "to_token"])
@pytest.mark.parametrize("position", [1, 20, 45])
def test_future_token_leaves_the_past(model, position, new):
    text = TEXTS["mixed"].clone()
    before = full_logits(model, text)
    text[position] = new
    after = full_logits(model, text)
    close(after[:position], before[:position])


def test_future_matters_at_all(model):
    """The twin of the test above: a changed token does change what follows."""
    text = TEXTS["mixed"].clone()
    before = full_logits(model, text)
    text[0] = 9
    assert (full_logits(model, text)[1:6] - before[1:6]).abs().max() > 1e-3


@pytest.mark.parametrize("sentences", [1, 3])
def test_packed_documents_equal_each_alone(model, sentences):
    documents = [random_text(31, seed=7, end_every=31 / sentences), random_text(17, seed=8), torch.tensor([START])]
    packed = full_logits(model, torch.cat(documents))
    close(packed, torch.cat([full_logits(model, document) for document in documents]))


def test_sentence_alone_equals_sentence_in_context_at_the_encoder(visibility):
    model = tiny_model(visibility)
    sentence = torch.tensor([8, 9, 10, 11, END])
    context = torch.cat([TEXTS["ends_at_end"], sentence, torch.tensor([4, 5])])

    def encoded(ids: Tensor) -> Tensor:
        with torch.no_grad():
            states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
        return states[model.config.num_encoder_layers][0]

    start = len(TEXTS["ends_at_end"])
    close(encoded(context)[start : start + len(sentence)], encoded(sentence))


@pytest.mark.parametrize("body_positions", ["sentence", "token"])
def test_either_position_scheme_is_exact(visibility, body_positions):
    model = tiny_model(visibility, body_positions=body_positions)
    text = TEXTS["two_documents"]
    close(chunked_logits(model, text, [11] + [1] * (len(text) - 11)), full_logits(model, text))


def test_plain_gpt_reads_text_without_sentence_ends():
    model = tiny_model("causal", num_encoder_layers=0, num_body_layers=3, sentence_end_token_id=None)
    text = TEXTS["two_documents"]
    close(chunked_logits(model, text, [9] + [1] * (len(text) - 9)), full_logits(model, text))


def test_empty_chunk_changes_nothing(model):
    text = TEXTS["mixed"]
    cache = model.new_cache(1)
    with torch.no_grad():
        model(text[None, :30], cache=cache)
        assert model(text[None, :0], cache=cache).logits.shape[1] == 0
        close(model(text[None, 30:], cache=cache).logits[0], full_logits(model, text)[30:])


def test_gradients_equal_those_of_the_dense_mask(model):
    """Training by structure is training by mask."""
    text = TEXTS["two_documents"][None]
    gradients = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(text, labels=text.masked_fill(text == END, 5)).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    close(gradients[0], gradients[1])


def test_saved_equals_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = GPTHFForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    close(full_logits(loaded, TEXTS["mixed"]), full_logits(model, TEXTS["mixed"]))

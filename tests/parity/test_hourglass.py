"""The hourglass and every switch, alone and together: at once == step by step, in float64 to 1e-9."""

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
    entries_expected,
    full_logits,
    random_text,
    tiny_model,
)
from thoughtformer.attention.rotary import Rotary, rotate
from thoughtformer.errors import ConfigError
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.models.gpthf.depths import with_depths


def test_gathered_equals_dense_mask(switched_model):
    for ids in TEXTS.values():
        switched_model.set_attn_implementation("sdpa")
        gathered = full_logits(switched_model, ids)
        switched_model.set_attn_implementation("eager")
        close(gathered, full_logits(switched_model, ids))


@pytest.mark.parametrize("name", ["adjacent_ends", "starts_with_end", "documents_unfinished"])
def test_step_by_step_equals_at_once(switched_model, name):
    ids = TEXTS[name]
    close(chunked_logits(switched_model, ids, [1] * len(ids)), full_logits(switched_model, ids))


@pytest.mark.parametrize("sizes", [[3] * 23 + [1], [33, 33, 4], [23] + [1] * 47], ids=str)
def test_chunks_equal_at_once(switched_model, sizes):
    close(chunked_logits(switched_model, TEXTS["mixed"], sizes), full_logits(switched_model, TEXTS["mixed"]))


def test_bytes_equal_the_formula_at_every_step(switched_model):
    ids = torch.cat([TEXTS["long_sentence"][:30], TEXTS["two_documents"], TEXTS["adjacent_ends"]])
    cache = switched_model.new_cache(1)
    with torch.no_grad():
        for count in range(1, len(ids) + 1):
            switched_model(ids[None, count - 1 : count], cache=cache)
            expected = entries_expected(switched_model, ids[:count])
            assert {stage.name: int(stage.lengths[0]) for stage in cache.stages} == expected
            assert cache.num_bytes() == switched_model.model.cache_bytes(expected, num_rows=1)


@pytest.mark.parametrize("kept", [1, 5])
def test_fewer_logits_are_the_same(switched_model, kept):
    """Asking for fewer logits lets fewer tokens pass the last stage, and leaves the cache right."""
    for name in ("mixed", "ends_at_end", "adjacent_ends", "documents_unfinished", "one_token"):
        ids = TEXTS[name]
        with torch.no_grad():
            output = switched_model(ids[None], logits_to_keep=min(kept, len(ids)), use_cache=True)
            following = switched_model(torch.tensor([[9, END, 4]]), cache=output.cache)
        expected = full_logits(switched_model, torch.cat([ids, torch.tensor([9, END, 4])]))
        close(output.logits[0], expected[len(ids) - min(kept, len(ids)) : -3])
        close(following.logits[0], expected[-3:])


def test_last_logits_of_pieces(switched_model):
    check_last_logits_of_pieces(switched_model)


def test_ragged_batch_equals_each_row_alone(switched_model):
    """Padded rows, then steps in which rows close sentences at different times."""
    rows = [TEXTS[name] for name in ("mixed", "one_token", "two_documents", "ends_at_end", "no_start")]
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    continuations = torch.stack([random_text(20, seed=50 + number)[1:] for number in range(len(rows))])
    with torch.no_grad():
        output = switched_model(ids, attention_mask=mask, use_cache=True)
        steps = [switched_model(column, cache=output.cache).logits for column in continuations.split(1, dim=1)]
    assert output.cache.num_tokens.tolist() == [len(row) + 19 for row in rows]
    stepped = torch.cat(steps, dim=1)
    for number, row in enumerate(rows):
        expected = full_logits(switched_model, torch.cat([row, continuations[number]]))
        close(output.logits[number, mask[number].bool()], expected[: len(row)])
        close(stepped[number], expected[len(row) :])


@pytest.mark.parametrize("new", [END, START, 11], ids=["to_end", "to_start", "to_token"])
def test_future_token_leaves_the_past(switched_model, new):
    text = TEXTS["mixed"].clone()
    before = full_logits(switched_model, text)
    for position in (1, 20, 45):
        changed = text.clone()
        changed[position] = new
        close(full_logits(switched_model, changed)[:position], before[:position])


def test_packed_documents_equal_each_alone(switched_model):
    documents = [random_text(31, seed=7), random_text(17, seed=8), torch.tensor([START]), random_text(9, seed=9)]
    packed = full_logits(switched_model, torch.cat(documents))
    close(packed, torch.cat([full_logits(switched_model, document) for document in documents]))


@pytest.mark.parametrize("accepted", [0, 5])
def test_rollback_and_partial_commit(switched_model, accepted):
    prompt, following = TEXTS["mixed"][:33], random_text(15, seed=90)[1:]
    draft = torch.tensor([7, END, 8, 9, END, END, 10, START, 11, END, 12, 13])
    cache = switched_model.new_cache(1)
    with torch.no_grad():
        switched_model(prompt[None], cache=cache)
        cache.autocommit = False
        drafts = torch.cat([switched_model(part[None], cache=cache).logits[0] for part in draft.split(2)])
        cache.commit(torch.tensor([accepted])) if accepted else cache.rollback()
        cache.autocommit = True
        continued = torch.cat([switched_model(token[None], cache=cache).logits[0] for token in following.split(1)])
    close(drafts, full_logits(switched_model, torch.cat([prompt, draft]))[33:])
    assert cache.num_tokens.tolist() == [33 + accepted + 14]
    whole = torch.cat([prompt, draft[:accepted], following])
    close(continued, full_logits(switched_model, whole)[33 + accepted :])
    assert cache.num_bytes() == switched_model.model.cache_bytes(entries_expected(switched_model, whole), num_rows=1)


def test_gradients_equal_those_of_the_dense_mask(switched_model):
    text = TEXTS["two_documents"][None]
    gradients = []
    switched_model.train()  # some losses are of training alone
    for implementation in ("sdpa", "eager"):
        switched_model.set_attn_implementation(implementation)
        switched_model.zero_grad()
        switched_model(text, labels=text.masked_fill(text == END, 5)).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in switched_model.parameters()]))
    close(gradients[0], gradients[1])


def test_saved_equals_loaded(switched_model, tmp_path):
    switched_model.save_pretrained(tmp_path)
    loaded = GPTHFForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    close(full_logits(loaded, TEXTS["mixed"]), full_logits(switched_model, TEXTS["mixed"]))


def test_generate_equals_choosing_from_whole_forwards(switched_model):
    prompts = [TEXTS["mixed"][:29], TEXTS["two_documents"][:30], TEXTS["ends_at_end"]]
    longest = max(len(prompt) for prompt in prompts)
    ids, mask = torch.full((3, longest), PAD), torch.zeros(3, longest, dtype=torch.long)
    for number, prompt in enumerate(prompts):
        ids[number, longest - len(prompt) :], mask[number, longest - len(prompt) :] = prompt, 1
    new = switched_model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
    for number, prompt in enumerate(prompts):
        text = prompt
        for _ in range(9):
            text = torch.cat([text, full_logits(switched_model, text)[-1].argmax()[None]])
        assert new[number, longest:].tolist() == text[len(prompt) :].tolist()


@pytest.mark.parametrize("own", [False, True], ids=["earlier", "own"])
@pytest.mark.parametrize("positions", ["sentence", "none"])
def test_hourglass_in_words(positions, own):
    """Another implementation: sentence by sentence and token by token, from the method's description alone."""
    model = tiny_model("hourglass", memory_positions=positions, ends_read_own_summary=own)
    ids = TEXTS["mixed"][:40]
    close(_in_words(model, ids, positions=positions, own=own), full_logits(model, ids))


@torch.no_grad()
def _in_words(model: GPTHFForCausalLM, ids: Tensor, *, positions: str, own: bool) -> Tensor:
    config, parts = model.config, model.model
    encoder, body, decoder = parts.stages
    heads, width = config.num_attention_heads, config.head_dim

    def turned(states: Tensor, position: int) -> Tensor:
        cos, sin = Rotary(width, config.rope_theta).angles(torch.tensor([position]), torch.float64)
        return rotate(states[None], cos, sin)[0]

    def qkv(layer, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product = layer.attention.qkv_proj.weight @ layer.attention_norm(state)
        return tuple(product.view(3, heads, width))  # type: ignore[return-value]

    def finished(layer, state: Tensor, scores: list[Tensor], values: list[Tensor]) -> Tensor:
        weights = (torch.stack(scores) * width**-0.5).softmax(dim=0)
        attended = (weights[..., None] * torch.stack(values)).sum(0).flatten()
        state = state + layer.attention.o_proj.weight @ attended
        return state + layer.mlp(layer.mlp_norm(state)[None])[0]

    def causal(stage, states: list[Tensor], numbers: list[int]) -> list[Tensor]:
        for layer in stage.layers:
            asked = [qkv(layer, state) for state in states]
            states = [
                finished(
                    layer,
                    states[i],
                    [(turned(asked[i][0], numbers[i]) * turned(asked[j][1], numbers[j])).sum(-1) for j in range(i + 1)],
                    [asked[j][2] for j in range(i + 1)],
                )
                for i in range(len(states))
            ]
        return states

    sentences: list[list[int]] = [[]]
    for index, token in enumerate(ids.tolist()):
        sentences[-1].append(index)
        if token in (START, END):
            sentences.append([])
    logits: list[Tensor] = []
    encoded = [
        causal(encoder, [parts.embed_tokens.weight[ids[index]] for index in sentence], list(range(len(sentence))))
        for sentence in sentences
    ]
    end_positions = [sentence[-1] for sentence in sentences[:-1]]
    thoughts = causal(body, [states[-1] for states in encoded[:-1]], end_positions)
    for number, (sentence, states) in enumerate(zip(sentences, encoded)):
        for layer in decoder.layers:
            asked = [qkv(layer, state) for state in states]
            out = []
            for place in range(len(sentence)):
                closes = number < len(thoughts) and place == len(sentence) - 1
                earlier = [qkv(layer, thought) for thought in thoughts[: number + (own and closes)]]
                far = number if positions == "sentence" else 0
                scores = [(turned(asked[place][0], place) * turned(asked[j][1], j)).sum(-1) for j in range(place + 1)]
                scores += [
                    (turned(asked[place][0], far) * turned(key, s if positions == "sentence" else 0)).sum(-1)
                    for s, (_, key, _) in enumerate(earlier)
                ]
                values = [asked[j][2] for j in range(place + 1)] + [value for _, _, value in earlier]
                out.append(finished(layer, states[place], scores, values))
            states = out
        logits += [model.lm_head.weight @ parts.norm(state) for state in states]
    for index, token in enumerate(ids.tolist()):
        if token in (START, END):
            logits[index][END] = torch.finfo(torch.float64).min  # an end never follows an end
    return torch.stack(logits)


@pytest.mark.parametrize("visibility", ["hourglass", "hybrid", "causal"])
@pytest.mark.parametrize("autocommit", [True, False])
def test_a_failed_step_leaves_no_trace(visibility, autocommit):
    """Whether steps are committed or pile up; the last layer fails after all caches were written."""
    model = tiny_model(visibility, num_encoder_layers=0 if visibility == "causal" else 1)
    ids, cache = TEXTS["mixed"][:40], model.new_cache(1)
    mlp = model.model.stages[-1].layers[-1].mlp
    with torch.no_grad():
        model(ids[None, :30], cache=cache)
        cache.autocommit = autocommit
        first = model(ids[None, 30:33], cache=cache).logits[0]
        mlp.forward = lambda states: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(torch.tensor([[7, END, 8]]), cache=cache)
        del mlp.forward
        rest = model(ids[None, 33:], cache=cache).logits[0]
        close(torch.cat([first, rest]), full_logits(model, ids)[30:])
        cache.commit()
    assert cache.num_bytes() == model.model.cache_bytes(entries_expected(model, ids), num_rows=1)


def test_depths_switched_on_later_start_at_nothing(tmp_path):
    """A trained hourglass goes on as it was, until the gains are trained."""
    model = tiny_model("hourglass", num_encoder_layers=2)
    model.save_pretrained(tmp_path)
    switched = GPTHFForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, body_reads_depths=True, decoder_reads_depths=True
    ).eval()
    assert len(switched.model.body_depths) == len(switched.model.memory_depths) == 2
    assert not any(bool(gain.any()) for gain in (*switched.model.body_depths, *switched.model.memory_depths))
    close(full_logits(switched, TEXTS["mixed"]), full_logits(model, TEXTS["mixed"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decoder_layers": 1, "body_visibility": "hybrid"}, "needs body_visibility='fast', not 'hybrid'"),
        ({"num_decoder_layers": 1, "body_visibility": "fast", "num_encoder_layers": 0}, "num_encoder_layers=0"),
        ({"num_decoder_layers": -1}, "num_decoder_layers=-1"),
        ({"summaries_per_sentence": 2}, "summaries_per_sentence=2 needs a decoder"),
        ({"memory_positions": "none"}, "memory_positions='none' needs a decoder"),
        ({"memory_positions": "sentense"}, "Did you mean 'sentence'"),
        ({"decoder_reads_depths": True}, "decoder_reads_depths=True needs a decoder"),
        (
            {"recent_sentences": 1, "body_visibility": "fast"},
            "recent_sentences=1 needs a decoder, or a body",
        ),
        ({"body_hidden_size": 10}, "body_hidden_size=10 must be a multiple of 4"),
        ({"body_intermediate_size": 0}, "body_intermediate_size=0 must be 1 or more"),
        ({"body_hidden_size": 32, "num_encoder_layers": 0}, "set the body apart from an encoder"),
        ({"body_reads_depths": True, "num_encoder_layers": 0}, "num_encoder_layers of 1 or more"),
        ({"rebuild_loss_weight": 1.0, "num_encoder_layers": 0}, "needs an encoder"),
        ({"next_sentence_loss_weight": -1.0}, "next_sentence_loss_weight=-1.0 must be 0 or more"),
        ({"rebuild_loss_weight": float("nan")}, "rebuild_loss_weight=nan must be 0 or more"),
    ],
    ids=str,
)
def test_switches_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model(str(changes.pop("body_visibility", "hybrid")), **changes)


def test_depths_by_hand():
    """Embeddings and all encoder layers but the last, whose output is the state itself."""
    states, embedded, first = (torch.tensor([[value, 2 * value]]) for value in (1.0, 10.0, 100.0))
    gains = torch.nn.ParameterList([torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.25])])
    assert with_depths(states, [embedded, first, states], list(gains)).tolist() == [[1 + 5.0, 2 + 50.0]]

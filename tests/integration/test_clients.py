"""What existing clients send and expect: fields that mean nothing here, defaults, ends, other origins, seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lms import served_pair, tiny_lm
from prose import PAGE, tiny_tokenizer
from serving import Running, serving
from thoughtformer.compression import Full, compress
from thoughtformer.decode import Suffix
from thoughtformer.engine import Engine, Limits, runner_of
from thoughtformer.sampling import SamplingParams

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.name is defined %}({{ m.name }}) {% endif %}"
    "{{ m.role }}: {{ m.content }}<|stop|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
USER = {"role": "user", "content": "Where does the ferry go?"}


def ended_pair(positions: int = 256) -> tuple[Any, PreTrainedTokenizerFast]:
    """A causal LM with three kinds of end, each named in one place, whose tokenizer writes both ends of a text."""
    tokenizer = _tokenizer()
    model = tiny_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=positions)
    stop, eot, eos = tokenizer.convert_tokens_to_ids(["<|stop|>", "<|eot|>", "</s>"])
    assert tokenizer.eos_token_id == eos
    model.config.eos_token_id = eot
    model.generation_config.eos_token_id = [stop, -1]
    return compress(model, Full()), tokenizer


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tiny_tokenizer(False).backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>", "<|eot|>", "<|other|>"]})
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@contextmanager
def writing(running_runner: Any, *tokens: int) -> Iterator[None]:
    """The model writes these tokens, one after the other, and the last for ever."""
    step, read_on = running_runner.step, running_runner.read_on
    written = iter(tokens)

    def logits_of(rows: int) -> torch.Tensor:
        logits = torch.zeros(rows, running_runner.vocab_size)
        logits[:, next(written, tokens[-1])] = 100.0
        return logits

    def stepped(ids, cache):
        step(ids, cache)
        return logits_of(len(ids))

    def read(ids, cache, most):
        _, held, known = read_on(ids, cache, most)
        return logits_of(1), held, known

    running_runner.step, running_runner.read_on = stepped, read
    try:
        yield
    finally:
        del running_runner.step, running_runner.read_on


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(ended_pair(), max_new_tokens=100) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: Running, body: dict[str, Any], path: str = "chat/completions") -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json={"model": "tiny", "max_tokens": 3} | body, timeout=60)


@pytest.mark.parametrize("end", ["</s>", "<|eot|>", "<|stop|>"])
def test_every_end_that_is_named_ends(server, client, end):
    """By the tokenizer, the configuration, or the generation configuration."""
    runner = server.service.runner
    letter, token = runner.tokenizer.backend_ids("A")[0], runner.special_tokens[end]
    with writing(runner, letter, token):
        done = client.completions.create(model="tiny", prompt="a", max_tokens=9)
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("A", "stop")
    assert done.usage.completion_tokens == 2
    with writing(runner, letter, token):
        more = client.completions.create(model="tiny", prompt="a", max_tokens=9, extra_body={"ignore_eos": True})
    assert (more.usage.completion_tokens, more.choices[0].finish_reason) == (9, "length")


@pytest.mark.parametrize(
    "wish",
    [
        {"stop": "<|other|>"},
        {"stop": ["nowhere", "\n<|other|>user"]},
        {"extra_body": {"stop_token_ids": [404]}},
        {"stop": ["<|other|>"], "extra_body": {"ignore_eos": True}},
    ],
)
def test_ends_by_wish(server, client, wish):
    runner = server.service.runner
    letter, token = runner.tokenizer.backend_ids("A")[0], runner.special_tokens["<|other|>"]
    assert token == 404
    for stream in (False, True):
        with writing(runner, letter, token, letter):
            done = client.completions.create(model="tiny", prompt="a", max_tokens=9, stream=stream, **wish)
            choices = [chunk.choices[0] for chunk in done] if stream else [done.choices[0]]
        assert "".join(choice.text for choice in choices) == "A"
        assert choices[-1].finish_reason == "stop"
    engine = Engine(*ended_pair())
    with writing(engine.runner, letter, letter):
        params = SamplingParams(max_new_tokens=9, stop_token_ids=[letter])
        done = engine.generate(["a"], params)[0]
    assert (done.text, done.ids, done.finish_reason) == ("", [letter], "stop_token"), "an ordinary token isn't shown"


def test_a_session_goes_on_before_the_end(server, client):
    """What ended an answer is written once: by the template, as the next turn begins."""
    runner = server.service.runner
    letter, token = runner.tokenizer.backend_ids("A")[0], runner.special_tokens["<|stop|>"]
    settings: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "extra_body": {"session": "ends"}}
    for turn, wish in enumerate(({}, {"stop": ["<|stop|>"]})):
        with writing(runner, letter, token):
            client.chat.completions.create(messages=[USER], **settings, **wish)
        (session,) = server.service.sessions._cached.values()
        assert session.ids[-1] == letter
        assert session.ids.count(token) == 2 * turn + 1
        assert session.ids.count(runner.special_tokens["<s>"]) == 1
        assert runner.special_tokens["</s>"] not in session.ids
    server.service.sessions.delete("ends")


def test_prompts_do_not_end_in_the_end(server):
    """Which a post-processor puts behind a text; what somebody wrote stays; a start is put there once."""
    runner = server.service.runner
    start, end = runner.special_tokens["<s>"], runner.special_tokens["</s>"]
    plain = runner.tokenizer
    assert runner.encode("The ferry") == [start, *plain.backend_ids("The ferry")]
    assert runner.encode("The ferry</s>") == [start, *plain.backend_ids("The ferry"), end]
    assert runner.encode("<s>The ferry") == [start, *plain.backend_ids("The ferry")]
    assert runner.encode("") == [start]
    assert runner.encode(" left.", start=False) == plain.backend_ids(" left.")
    document = plain.encode_document("The ferry", complete=True).tolist()
    assert document == [start, *plain.backend_ids("The ferry"), end], "a document may end there"
    assert plain.encode_document("The ferry</s>", complete=True).tolist() == document


def test_messages_of_clients(server, client):
    seen: list[list[int]] = []
    scheduler = server.service.scheduler
    original = scheduler.prepare
    scheduler.prepare = lambda prompt, params: (seen.append(prompt), original(prompt, params))[1]
    tokenizer = server.service.runner.tokenizer
    try:
        answer = client.chat.completions.create(model="tiny", messages=[USER], max_tokens=3)
        verbatim = answer.choices[0].message.model_dump()
        assert verbatim["tool_calls"] is None
        assert verbatim["content"] is not None
        nulls = {"refusal": None, "audio": None, "function_call": None, "annotations": []}
        for message in (
            verbatim,
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "assistant", "content": None} | nulls,
            {"role": "assistant"},
            {"role": "assistant", "content": "x", "provider_specific_fields": {"a": [1]}, "reasoning_content": "Hm."},
            {"role": "assistant", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "user", "content": "x", "type": "text", "name": "bob"},
            {"role": "tool", "content": "x", "tool_call_id": "1"},
            {"role": "system", "content": ""},
        ):
            done = post(server, {"messages": [USER, message, USER]})
            assert done.status_code == 200, (message, done.text)
            assert "None" not in tokenizer.decode(seen[-1])
        post(server, {"messages": [USER | {"name": "bob"}]})
        assert "(bob) user: Where" in tokenizer.decode(seen[-1])
        post(server, {"messages": [{"role": "developer", "content": "Be brief."}, USER]})
        assert "system: Be brief." in tokenizer.decode(seen[-1])
        for message, told in (
            ({"role": "user", "content": None}, "needs content"),
            ({"role": "user"}, "needs content"),
            ({"role": "robot", "content": "x"}, "role"),
            ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "text alone"),
            ({"role": "user", "content": [{"type": "text"}]}, "text alone"),
            ({"role": "user", "content": 7}, "content"),
            ({"role": "user", "content": "x", "deep": json.loads("[" * 700 + "]" * 700)}, None),
        ):
            done = post(server, {"messages": [message]})
            assert done.status_code == 400 or told is None, message
            assert told is None or told in done.json()["error"]["message"]
            assert done.status_code < 500
    finally:
        del scheduler.prepare


KEYS: dict[str, Any] = {
    "nulls": dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "logit_bias", "logprobs", "user")
    ),
    "more_nulls": dict.fromkeys(
        ("tools", "tool_choice", "response_format", "prediction", "audio", "session", "return_context", "ignore_eos")
    ),
    "unknown_nulls": {"a_key_of_next_year": None},
    "off": {"tools": [], "tool_choice": "auto", "logit_bias": {}, "response_format": {"type": "text"}, "top_k": 0},
    "penalties": {"presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False},
    "said_elsewhere": {"service_tier": "auto", "store": True, "metadata": {"a": "b"}, "safety_identifier": "x"},
    "caching": {"prompt_cache_key": "x", "prompt_cache_retention": "24h", "verbosity": "medium"},
    "speed": {"prediction": {"type": "content", "content": "x"}, "parallel_tool_calls": True, "modalities": ["text"]},
    "vllm": {"min_tokens": 0, "skip_special_tokens": True, "chat_template_kwargs": {}, "stop_token_ids": []},
    "greedy": {"top_p": 0},
    "nearly_greedy": {"temperature": 1e-9, "n": 2},
    "cold": {"temperature": 2e-5},
    "all_of_them": {"top_k": -1, "min_p": 0, "repetition_penalty": 1},
    "no_seed": {"seed": -(1 << 63)},
    "options": {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": True}},
    "limits": {"max_tokens": None, "max_completion_tokens": 3},
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_clients(server, name):
    done = post(server, {"messages": [USER], **KEYS[name]})
    assert done.status_code == 200, done.text


def test_what_a_client_predicts_changes_no_text():
    """It is copied from, and usage and metrics say what came of it."""
    asked = {"messages": [USER], "max_tokens": 12, "seed": 3, "ignore_eos": True}
    read = []

    class Noting(Suffix):
        def begin(self, *, client="", prediction=(), guess=None):
            read.append(list(prediction))
            return super().begin(client=client, prediction=prediction, guess=guess)

    with serving(ended_pair(), drafter=Noting()) as server:
        plain = post(server, asked).json()
        details = plain["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] <= 12
        for content in (PAGE[:90], [{"type": "text", "text": PAGE[:40]}, {"type": "text", "text": PAGE[40:90]}], ""):
            done = post(server, {**asked, "prediction": {"type": "content", "content": content}}).json()
            assert done["choices"] == plain["choices"]
            details = done["usage"]["completion_tokens_details"]
            assert (details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0) >= bool(content)
        page = server.service.runner.encode(PAGE[:90], start=False)
        assert read == [[], page, page, []]
        for wrong in ("text", {"type": "content"}, {"type": "file", "content": "x"}, {"content": [{"type": "image"}]}):
            assert post(server, {**asked, "prediction": wrong}).status_code == 400
        metrics = httpx.get(f"{server.url}/metrics").text
        (verified,) = (line for line in metrics.splitlines() if line.startswith("thoughtformer_draft_tokens_total"))
        assert float(verified.split()[1]) == server.service.scheduler.stats().drafts.verified.total() > 0


@pytest.mark.parametrize("settings", [{"top_p": 0}, {"temperature": 1e-9}, {"temperature": 0}, {"top_k": 1}])
def test_greedy_however_it_is_said(server, settings):
    def texts(**more: Any) -> list[str]:
        done = post(server, {"prompt": PAGE[:60], "max_tokens": 8} | more, "completions").json()
        return [choice["text"] for choice in done["choices"]]

    assert texts(n=3, **settings) == texts(temperature=0) * 3


def test_defaults_are_no_demands(server):
    """Who names no number gets what there is room for: in the model, and in memory."""
    runner, messages = server.service.runner, [USER | {"content": "The ferry. " * 8}]
    for extra in ({}, {"max_tokens": None}, {"max_completion_tokens": None}):
        done = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "tiny", "messages": messages, "ignore_eos": True, **extra},
            timeout=60,
        ).json()
        assert done["usage"]["completion_tokens"] == 100, "the server's most"
    prompt = "The ferry. " * 38
    chat = {"messages": [USER | {"content": prompt}], "ignore_eos": True}
    done = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "tiny", **chat}, timeout=60).json()
    assert done["usage"]["total_tokens"] == runner.max_tokens
    room = done["usage"]["completion_tokens"]
    assert 0 < room < 100
    refused = post(server, chat | {"max_tokens": room + 1})
    assert refused.json()["error"]["code"] == "context_length_exceeded", "a demand that can't be met is told"
    for words, expected in (("The ferry", 16), (_of_length(runner, runner.max_tokens - 5), 5)):
        body = {"model": "tiny", "prompt": words, "ignore_eos": True}
        done = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        assert done["usage"]["completion_tokens"] == expected
    body = {"model": "tiny", "prompt": _of_length(runner, runner.max_tokens)}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 400


def _of_length(runner: Any, tokens: int) -> list[int]:
    return runner.encode(PAGE)[:tokens]


def test_defaults_fit_the_memory():
    model, tokenizer = ended_pair()
    most = model.cache_bytes([100], 1)
    with serving((model, tokenizer), limits=Limits(max_bytes=most)) as running:
        body = {"model": "tiny", "messages": [USER], "ignore_eos": True}
        done = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).json()
        total = done["usage"]["total_tokens"]
        assert total >= 100
        assert model.cache_bytes([total - 1], 1) <= most < model.cache_bytes([256], 1)
        assert post(running, body | {"max_tokens": 200}).status_code == 413


def test_a_default_of_the_servers_own():
    with serving(ended_pair(), default_new_tokens=7) as running:
        for content, expected in (("The ferry", 7), (PAGE[:400], None)):
            body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "ignore_eos": True}
            done = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
            if expected is None:
                room = running.service.runner.max_tokens - done.json()["usage"]["prompt_tokens"]
                expected = min(7, room)
            assert done.json()["usage"]["completion_tokens"] == expected


def test_usage_in_streams(server, client):
    settings: dict[str, Any] = {"model": "tiny", "messages": [USER], "max_tokens": 4, "n": 2, "seed": 3}
    whole = client.chat.completions.create(**settings)
    body = settings | {"stream": True, "stream_options": {"include_usage": True}}
    lines = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text.split("\n\n")
    *chunks, last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert all("usage" in chunk and chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], json.loads(whole.usage.model_dump_json(exclude_none=True)))
    body = settings | {"stream": True}
    assert '"usage"' not in httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text


def test_rows_share_no_draws(server):
    def texts(**more: Any) -> list[str]:
        done = post(
            server, {"prompt": "The", "max_tokens": 12, "temperature": 1.5, "ignore_eos": True} | more, "completions"
        )
        return [choice["text"] for choice in done.json()["choices"]]

    assert texts() != texts(), "no seed"
    for seed in (0, 7, -7, (1 << 63) - 1, -(1 << 63)):
        rows = texts(n=3, seed=seed)
        assert rows == texts(n=3, seed=seed)
        assert rows[:2] == texts(n=2, seed=seed)
        assert rows[:1] == texts(seed=seed)
        several = texts(prompt=["The", "The"], n=2, seed=seed)
        assert several[:2] == rows[:2]
        assert len({*rows, *several[2:], *texts(n=3, seed=seed + 1 if seed < 8 else 1)}) == 8
    assert texts(seed=1) != texts(seed=1 + (1 << 32)), "all of a seed counts"


def test_rows_of_an_engine_share_no_draws():
    engine = Engine(*ended_pair())
    prompts, warm = ["The"] * 4, {"max_new_tokens": 12, "temperature": 1.5, "ignore_end_of_text": True}

    def texts(params: Any, prompts: list[str] = prompts) -> list[str]:
        return [done.text for done in engine.generate(prompts, params)]

    assert len({*texts(SamplingParams(**warm)), *texts(SamplingParams(**warm))}) == 8
    seeded = SamplingParams(**warm, seed=5)
    assert len({*texts(seeded)}) == 4
    assert texts(seeded) == texts(seeded)
    assert texts(seeded)[:2] == texts(seeded, prompts[:2])
    assert texts([seeded] * 4) == texts(seeded, prompts[:1]) * 4, "whoever gives each its params gets these"


ORIGIN = {"Origin": "https://chat.example.org"}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type, authorization"}


def test_pages_of_other_origins(server):
    done = httpx.options(f"{server.url}/v1/completions", headers=ORIGIN | PREFLIGHT)
    assert done.status_code == 405
    assert "access-control-allow-origin" not in done.headers, "off by default"
    for origins, allowed in ((("https://chat.example.org",), ORIGIN["Origin"]), (("*",), "*")):
        settings: dict[str, Any] = {"cors_origins": origins, "token": "secret"}
        with serving(ended_pair(), **settings) as running, httpx.Client(base_url=running.url, headers=ORIGIN) as http:
            for path in ("/v1/completions", "/v1/chat/completions"):
                done = http.options(path, headers=PREFLIGHT)
                assert done.status_code == 200
                assert done.headers["access-control-allow-origin"] == allowed
                assert "authorization" in done.headers["access-control-allow-headers"]
            bearer = {"Authorization": "Bearer secret"}
            for status, done in (
                (200, http.get("/v1/models", headers=bearer)),
                (401, http.get("/v1/models")),
                (404, http.get("/nothing", headers=bearer)),
                (400, http.post("/v1/completions", headers=bearer, content=b"{")),
            ):
                assert (done.status_code, done.headers["access-control-allow-origin"]) == (status, allowed)
            if allowed != "*":
                other = http.get("/v1/models", headers=bearer | {"Origin": "https://evil.example.org"})
                assert "access-control-allow-origin" not in other.headers
                assert http.options("/v1/models", headers=PREFLIGHT | {"Origin": "https://evil.example.org"}).is_error


def test_every_failure_has_the_same_shape(monkeypatch):
    model, tokenizer = ended_pair()
    with serving((model, tokenizer), allowed_hosts=("127.0.0.1",), cors_origins=("*",)) as running:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise KeyError("unforeseen")

        with httpx.Client(base_url=running.url, headers=ORIGIN, timeout=60) as http:
            good = {"model": "tiny", "prompt": "a", "max_tokens": 2}
            answers = [
                (404, http.get("/nothing")),
                (404, http.post("/v1/embeddings", json={})),
                (404, http.get("/v1/models/other")),
                (405, http.get("/v1/completions")),
                (405, http.put("/v1/models")),
                (400, http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})),
                (400, http.post("/v1/completions", content=json.dumps(good), headers={"Content-Type": "text/plain"})),
                (400, http.get("/v1/models", headers={"Host": "evil.example.org"})),
                (404, http.delete("/v1/sessions/none")),
            ]
            monkeypatch.setattr(running.service, "_submit", fail)
            answers.append((500, http.post("/v1/completions", json=good)))
            monkeypatch.undo()
            monkeypatch.setattr(running.service, "parts_of", fail)
            stream = http.post("/v1/completions", json=good | {"stream": True, "return_context": True})
            assert json.loads(stream.text.split("data: ")[-1])["error"]["code"] == "internal_error"
            monkeypatch.undo()
            for status, answer in answers:
                assert answer.status_code == status, answer.text
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["message"]
                assert answer.headers["access-control-allow-origin"] == "*", "or pages couldn't read it"
            assert http.get("/v1/models", headers={"Host": "127.0.0.1:80"}).status_code == 200


def test_templates_own_errors_are_told():
    model, tokenizer = ended_pair()
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
    with serving((model, tokenizer)) as running:
        done = post(running, {"messages": [USER]})
        assert done.status_code == 400
        assert "roles must alternate" in done.json()["error"]["message"]


def test_models_say_who_they_are(server, client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "thoughtformer")
    assert model.created > 0
    assert client.models.retrieve("tiny") == model


def test_gpthf_keeps_further_ends():
    """An end of turns beside the end of text, as of a GPTHF that was trained on conversations."""
    from prose import tiny_pair

    model, tokenizer = tiny_pair()
    model.config.eos_token_id = [0, 7]
    model.generation_config.eos_token_id = 8
    runner = runner_of(model, tokenizer)
    assert runner.end_ids == (0, 7, 8)
    assert runner.start_ids == (0,)
    compressed, other = served_pair("sentinel_plain")
    compressed.model.config.eos_token_id = [0, 9]
    assert 9 in runner_of(compressed, other).end_ids

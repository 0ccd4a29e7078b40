"""The server as clients meet it: OpenAI's own client, raw HTTP, mistakes, limits, and people who go away."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
import threading
import time

import httpx
import openai
import pytest
import torch

from lms import served_pair, tiny_compressed
from prose import PAGE, prose, tiny_pair
from serving import serving
from thoughtformer.engine import Engine, Limits, SentenceStore
from thoughtformer.errors import InputError
from thoughtformer.sampling import SamplingParams, derived_seed
from thoughtformer.text.chat import encode_chat
from thoughtformer.text.plain import document_tokenizer

JSON = {"Content-Type": "application/json"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def server(pair, tmp_path_factory):
    place = tmp_path_factory.mktemp("serve")
    with (
        SentenceStore(place / "store") as store,
        serving(pair, limits=Limits(max_rows=8, max_prefill_tokens=128), store=store, folder=place / "s") as running,
    ):
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def test_completions_are_the_engines(server, client, pair):
    engine = Engine(*pair)
    for prompt, settings, params in [
        (PAGE[:200], {"temperature": 0}, SamplingParams(max_new_tokens=20)),
        (
            "The ferry",
            {"temperature": 0.9, "top_p": 0.8, "seed": 5, "stop": ["e"], "extra_body": {"top_k": 30}},
            SamplingParams(max_new_tokens=20, temperature=0.9, top_p=0.8, top_k=30, seed=5, stop=["e"]),
        ),
    ]:
        expected = engine.generate([prompt], params)[0]
        done = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, **settings)
        assert done.choices[0].text == expected.text
        assert done.choices[0].finish_reason == ("length" if expected.finish_reason == "length" else "stop")
        assert done.usage.prompt_tokens == expected.usage.prompt_tokens
        assert done.usage.completion_tokens == expected.usage.new_tokens
        assert done.usage.prompt_tokens_details.sentence_ends == expected.usage.prompt_sentence_ends
        stream = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=20, stream=True, stream_options={"include_usage": True}, **settings
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected.text
        assert chunks[-1].usage.completion_tokens == expected.usage.new_tokens
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == done.choices[0].finish_reason
    server.settle()


def test_several_prompts_and_choices(client, pair):
    ids = pair[1]("Wait.")["input_ids"]
    done = client.completions.create(model="tiny", prompt=["The ferry", "Wait."], n=2, max_tokens=6, seed=1)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.choices[0].text != done.choices[1].text
    alone = client.completions.create(model="tiny", prompt=ids, max_tokens=6, seed=derived_seed(1, 1, 0))
    assert alone.choices[0].text == done.choices[2].text
    assert done.usage.prompt_tokens == len(pair[1]("The ferry")["input_ids"]) + len(ids)
    nested = client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=6, seed=1)
    assert nested.choices[1].text == alone.choices[0].text
    assert nested.choices[0].text != alone.choices[0].text, "no two rows of a request share their draws"


def test_known_sentences_are_counted(client):
    prompt = prose(400, seed=77)
    counts = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens
        for _ in range(2)
    ]
    assert counts[0] < counts[1]


def test_models_health_and_metrics(client, http):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "thoughtformer"
    assert http.get("/health").json() == {"status": "ok"}
    client.completions.create(model="tiny", prompt="a", max_tokens=3)
    metrics = http.get("/metrics").text
    assert 'thoughtformer_requests_total{reason="length"}' in metrics
    assert "thoughtformer_cache_bytes 0.0" in metrics
    assert "thoughtformer_first_token_seconds_count" in metrics


@pytest.mark.parametrize(
    ("body", "status", "told", "param"),
    [
        ({"model": "other", "prompt": "a"}, 404, "'other' does not exist; this server has 'tiny'", "model"),
        ({"prompt": "a"}, 400, "model: Field required", "model"),
        ({"model": "tiny"}, 400, "prompt: Field required", "prompt"),
        ({"model": "tiny", "prompt": []}, 400, "empty list", None),
        ({"model": "tiny", "prompt": [[]]}, 400, "has no tokens", None),
        ({"model": "tiny", "prompt": [0, 10**6]}, 400, "outside 0 to", None),
        ({"model": "tiny", "prompt": [-1]}, 400, "outside 0 to", None),
        ({"model": "tiny", "prompt": {"a": 1}}, 400, "prompt", "prompt"),
        ({"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens"),
        ({"model": "tiny", "prompt": "a", "max_tokens": "7"}, 400, "max_tokens", "max_tokens"),
        ({"model": "tiny", "prompt": "a", "max_tokens": 5000}, 400, "this server writes 4096 at most", None),
        ({"model": "tiny", "prompt": "a", "max_tokens": 4000}, 400, "but the model was trained for 512", None),
        ({"model": "tiny", "prompt": "a", "temperature": -1}, 400, "temperature", "temperature"),
        ({"model": "tiny", "prompt": "a", "top_p": 1.5}, 400, "top_p", "top_p"),
        ({"model": "tiny", "prompt": "a", "top_k": -2}, 400, "top_k", "top_k"),
        ({"model": "tiny", "prompt": "a", "seed": 1 << 63}, 400, "seed", "seed"),
        ({"model": "tiny", "prompt": "a", "stop_token_ids": [10**6]}, 400, "stop_token_ids has 1000000", None),
        ({"model": "tiny", "prompt": "a", "tools": [{}]}, 400, "tools is not supported", None),
        ({"model": "tiny", "prompt": "a", "best_of": 3}, 400, "best_of is not supported", None),
        ({"model": "tiny", "prompt": "a", "reasoning_effort": "high"}, 400, "reasoning_effort is not supported", None),
        ({"model": "tiny", "prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias is not supported", None),
        ({"model": "tiny", "prompt": "a", "response_format": {"type": "json_object"}}, 400, "response_format", None),
        ({"model": "tiny", "prompt": "a", "n": 65}, 400, "one request may ask for 64", None),
        ({"model": "tiny", "prompt": "a", "n": 1000}, 400, "n: ", "n"),
        ({"model": "tiny", "prompt": "a", "stop": ["a"] * 20}, 400, "stop", "stop"),
        ({"model": "tiny", "prompt": "a", "stop": ""}, 400, "stop must be", None),
        ({"model": "tiny", "prompt": "a", "logprobs": 3}, 400, "logprobs is not supported", None),
        ({"model": "tiny", "prompt": "a", "echo": True}, 400, "echo is not supported", None),
        ({"model": "tiny", "prompt": "a", "bogus": 1}, 400, "'bogus' is no parameter here. Known: ", "bogus"),
        ({"model": "tiny", "prompt": "a", "stream_options": {}}, 400, "needs stream=true", None),
        ({"model": "tiny", "prompt": ["a", "b"], "session": "s"}, 400, "one prompt at a time", None),
        ({"model": "tiny", "prompt": "a \ud800 b"}, 400, "lone surrogate", None),
        ({"model": "\ud800", "prompt": "a"}, 404, "does not exist", "model"),
        ([1, 2], 400, "must be a JSON object", None),
    ],
)
def test_mistakes_are_told(server, http, body, status, told, param):
    answer = http.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert told in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not server.service.scheduler.has_work


def test_malformed_bodies(http):
    headers = {"Content-Type": "application/json"}
    for content in (b'{"mod', b"", b"\xff\xfe\x00", b"null", b'"text"', b"[" * 100_000, b'{"prompt": NaN}', b"1e999"):
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400, content[:20]
        assert answer.json()["error"]["message"]
    nan = b'{"model": "tiny", "prompt": "a", "temperature": NaN}'
    assert http.post("/v1/completions", content=nan, headers=headers).status_code == 400
    assert http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 400
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 405)):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_openai_clients_see_their_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="trained for 512") as caught:
        client.completions.create(model="tiny", prompt=PAGE)
    assert caught.value.code == "context_length_exceeded"


def test_limits(pair):
    limits = Limits(max_rows=1, max_waiting=1, max_bytes=250_000)
    with serving(pair, limits=limits, max_body_bytes=5000, max_prompt_tokens=100, token="sesame") as running:
        wrong = httpx.Client(base_url=running.url)
        assert wrong.get("/health").status_code == 200
        assert wrong.get("/").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert wrong.get(path).status_code == 401
            assert wrong.get(path, headers={"Authorization": "Bearer sesam"}).status_code == 401
        http = httpx.Client(base_url=running.url, headers={"Authorization": "Bearer sesame"}, timeout=60)
        assert http.get("/v1/models").status_code == 200
        with (
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="x") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()

        def post(**more):
            return http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 5} | more)

        assert post(prompt="x" * 6000).status_code == 413
        chunked = http.post("/v1/completions", content=iter([b"x" * 3000] * 3))
        assert chunked.status_code == 413
        assert chunked.json()["error"]["code"] == "body_too_large"
        # A first piece that is a whole request: nothing of it is begun.
        whole = b'{"model": "tiny", "prompt": "a", "max_tokens": 5}'
        chunked = http.post("/v1/completions", content=iter([whole + b" " * 3000, b" " * 3000]), headers=JSON)
        assert chunked.status_code == 413
        assert running.service.scheduler.stats().prompt_tokens == 0
        answer = post(max_tokens=500)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        answer = post(prompt=PAGE[:1000], max_tokens=1)
        assert "this server reads 100 at most" in answer.json()["error"]["message"]
        assert answer.status_code == 413
        # More at once than could ever be in work, and more than may wait just now; nothing of either is begun.
        answer = post(n=3)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        params = SamplingParams(max_new_tokens=150, ignore_end_of_text=True)
        rows = [running.service.scheduler.submit("a", params) for _ in range(2)]
        answer = post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert answer.headers["Retry-After"] == "1"
        for row in rows:
            running.service.scheduler.cancel(row)
        running.settle()
        assert post(n=2).status_code == 200
        wrong.close()
        http.close()


def test_late_requests(pair):
    with serving(pair, request_seconds=0.001) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        body = {"model": "tiny", "prompt": PAGE[:300], "max_tokens": 200}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 504
        assert "longer than 0.001 seconds" in answer.json()["error"]["message"]
        lines = http.post("/v1/completions", json=body | {"stream": True}).text
        assert '"code": "deadline"' in lines
        assert "[DONE]" not in lines
        running.settle()


def test_failures_of_the_engine(pair, monkeypatch):
    model, tokenizer = tiny_pair()
    with serving((model, tokenizer)) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        monkeypatch.setattr(model, "ragged_logits", lambda *arguments, **more: 1 / 0)
        body = {"model": "tiny", "prompt": "a"}
        answer = http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
        assert '"engine_error"' in http.post("/v1/completions", json=body | {"stream": True}).text
        monkeypatch.undo()
        assert http.post("/v1/completions", json=body).status_code == 200


def test_sessions_go_on_where_they_were(server, client, http, pair):
    """Two turns in a session write what one prompt of both writes; the second reads only what is new."""
    name = "../a session/ with % odd \x00 name"
    settings = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    first = client.completions.create(prompt=PAGE[:120], extra_body={"session": name}, **settings)
    second = client.completions.create(prompt=" And then she", extra_body={"session": name}, **settings)
    engine, tokenizer = Engine(*pair), pair[1]
    start = tokenizer(PAGE[:120])["input_ids"]
    turn = engine.generate([start], SamplingParams(max_new_tokens=8))[0]
    assert turn.text == first.choices[0].text
    new = tokenizer.encode_document(" And then she", complete=False, start=False).tolist()
    whole = engine.generate([[*start, *turn.ids, *new]], SamplingParams(max_new_tokens=8))[0]
    assert second.choices[0].text == whole.text
    # All but the last token that the first turn wrote, which nothing had read yet.
    assert second.usage.prompt_tokens_details.cached_tokens == len(start) + 7
    quoted = httpx.URL(server.url).copy_with(
        raw_path=b"/v1/sessions/..%2Fa%20session%2F%20with%20%25%20odd%20%00%20name"
    )
    assert http.delete(quoted).json()["deleted"] is True
    assert http.delete(quoted).status_code == 404
    fresh = client.completions.create(prompt=PAGE[:120], extra_body={"session": name}, **settings)
    assert fresh.usage.prompt_tokens == first.usage.prompt_tokens


def test_sessions_that_fail(pair, tmp_path):
    """Busy, damaged, too long, removed meanwhile: each says so, and others go on."""
    with serving(pair, folder=tmp_path) as running, httpx.Client(base_url=running.url, timeout=60) as http:

        def post(session: str, **more) -> httpx.Response:
            body = {"model": "tiny", "prompt": "The ferry", "max_tokens": 4, "session": session}
            return http.post("/v1/completions", json=body | more)

        assert post("a").status_code == 200
        running.service.sessions.close()
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:-7])
        answer = post("a")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "session_unusable")
        file.write_bytes(whole)
        assert post("a").status_code == 200
        assert post("b", prompt=PAGE).status_code == 400
        assert post("b", max_tokens=3).status_code == 200, "nothing of the last is left"
        body = {"model": "tiny", "prompt": "x", "max_tokens": 300, "session": "a", "stream": True}
        body["ignore_eos"] = True  # or a draw that ends the text leaves the session free before the next request comes
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            answer = post("a")
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "session_busy")
            assert http.delete("/v1/sessions/a").status_code == 409
        running.settle()
        assert post("a").status_code == 200, "who leaves, leaves the session as it was"


def test_saving_sessions_keeps_nobody_waiting(pair, tmp_path):
    """A disk that takes its time: requests go on, one that is begun meanwhile is not lost, nor is one removed kept."""
    with serving(pair, folder=tmp_path) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        sessions, save = running.service.sessions, running.service.sessions._save
        sessions.max_bytes = 1
        goes_on, begun = threading.Event(), threading.Event()

        def slow(*saved) -> None:
            begun.set()
            goes_on.wait(30)
            save(*saved)

        sessions._save = slow

        def post(session: str | None) -> str:
            body = {"model": "tiny", "prompt": " And", "max_tokens": 6, "session": session, "seed": 1}
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200
            return answer.json()["choices"][0]["text"]

        first = post("a")
        assert begun.wait(10)
        post(None)
        second = post("a")  # while its first state is being written
        assert sessions.num_cached() == 1
        goes_on.set()
        running.service._saving.submit(lambda: None).result()  # all that was to be saved is
        third = post("a")
        sessions.close()
        sessions._save = save
        assert sessions.num_cached() == 0
        assert len(list(tmp_path.iterdir())) == 1
        goes_on.clear()
        begun.clear()
        sessions._save = slow
        post("b")
        assert begun.wait(10)
        removing = threading.Thread(target=http.delete, args=("/v1/sessions/b",))
        removing.start()
        time.sleep(0.1)
        goes_on.set()
        removing.join()
        sessions._save = save
        assert not sessions.has("b"), "it was being written when it was removed"
        assert http.delete("/v1/sessions/a").status_code == 200
        assert list(tmp_path.iterdir()) == []
        sessions.max_bytes = 1 << 30
        assert [post("a") for _ in range(3)] == [first, second, third]
        assert len({first, second, third}) == 3


def test_users_behind_one_address_take_turns(pair):
    """One user's many requests don't keep another's waiting."""
    with serving(pair, limits=Limits(max_rows=1)) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        ended: list[str] = []
        rows = [running.service.scheduler.submit("a", SamplingParams(max_new_tokens=400, ignore_end_of_text=True))]

        def post(user: str) -> None:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "user": user}
            assert http.post("/v1/completions", json=body).status_code == 200
            ended.append(user)

        threads = [threading.Thread(target=post, args=("many",)) for _ in range(6)]
        for thread in threads:
            thread.start()
        while running.service.scheduler.stats().waiting < 6:
            time.sleep(0.01)
        other = threading.Thread(target=post, args=("other",))
        other.start()
        while running.service.scheduler.stats().waiting < 7:
            time.sleep(0.01)
        running.service.scheduler.cancel(rows[0])
        for thread in (*threads, other):
            thread.join()
        assert ended.index("other") <= 3


@pytest.mark.parametrize("kind", ["sentinel_plain", "sentinel_sentences", "random"])
def test_compressed_models_are_served(kind, tmp_path):
    """What OpenAI's client gets is what transformers' generate writes; sessions and the page's context work too."""
    model, tokenizer = served_pair(kind)
    with serving((model, tokenizer), folder=tmp_path) as running:
        runner = running.service.runner
        ids = runner.encode(PAGE[:300])
        expected = runner.decode(
            model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        )
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            settings = {"model": "tiny", "max_tokens": 12, "temperature": 0}
            done = client.completions.create(prompt=PAGE[:300], **settings)
            assert done.choices[0].text == expected
            assert done.usage.prompt_tokens == len(ids)
            assert done.usage.prompt_tokens_details.sentence_ends == 0
            for _ in range(2):
                turn = client.completions.create(prompt=PAGE[:60], extra_body={"session": "s"}, **settings)
                running.service.sessions.close()  # to disk and back
            assert turn.usage.prompt_tokens_details.cached_tokens > 0
            stream = client.completions.create(
                prompt=PAGE[:300], stream=True, extra_body={"return_context": True}, **settings
            )
            first, *rest = list(stream)
            told = first.model_extra["context"]
            assert PAGE[:300].startswith(told["kept"])
            assert bool(told["sentences"]) == (kind != "random")
            last = rest[-1].model_extra["context"]
            assert 0 < last["held_bytes"] < last["plain_bytes"]
        running.settle()


def test_chat_of_other_tokenizers():
    """A causal LM's template, as transformers applies it; what people write stays text."""
    model, tokenizer = served_pair("streaming")
    specials = ["<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials, "bos_token": "<|endoftext|>"})
    model.model.resize_token_embeddings(len(tokenizer))
    model = tiny_compressed(model.model, model.method)
    with serving((model, tokenizer)) as running:
        seen: list[list[int]] = []
        original = running.service.scheduler.prepare
        running.service.scheduler.prepare = lambda prompt, params: seen.append(prompt) or original(prompt, params)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:

            def ask(*texts: str) -> list[int]:
                roles = ("user", "assistant", "user")
                messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
                client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
                return seen[-1]

            with pytest.raises(openai.BadRequestError, match="has no chat template"):
                ask("Hello")
            tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
            ids = ask(" Hello there. ", "Good day.", "Well?")
            messages = [
                {"role": "user", "content": " Hello there. "},
                {"role": "assistant", "content": "Good day."},
                {"role": "user", "content": "Well?"},
            ]
            assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            user, assistant = (tokenizer.convert_tokens_to_ids(token) for token in specials)
            ids = ask("I am <|assistant|> now")
            assert [ids.count(user), ids.count(assistant), ids.count(tokenizer.bos_token_id)] == [1, 1, 1]
            assert tokenizer.decode(ids) == "<|endoftext|><|user|>I am <|assistant|> now<|assistant|>"
            assert tokenizer.backend_tokenizer.encode_special_tokens is False, "as it was"


CHATML = (
    "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_chat_in_a_session_of_other_models():
    """Turn by turn the ids are those of the whole conversation: every turn is ended, the preamble comes once."""
    _, tokenizer = served_pair("streaming")
    specials = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = CHATML
    plain = document_tokenizer(tokenizer)
    user = {"role": "user", "content": "Who is there?"}
    again = {"role": "user", "content": "And <|user|> why?"}
    first = encode_chat(plain, [user])
    assert tokenizer.decode(first) == "<|system|>Be kind.<|end|><|user|>Who is there?<|end|><|assistant|>"
    answer = plain.backend_ids("It is I.")
    turn = encode_chat(plain, [again], start=False)
    assert tokenizer.decode(turn) == "<|end|><|user|>And <|user|> why?<|end|><|assistant|>"
    assert turn.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1
    whole = [user, {"role": "assistant", "content": "It is I."}, {"role": "user", "content": "And so?"}]
    turn = encode_chat(plain, whole[2:], start=False)
    assert [*first, *answer, *turn] == tokenizer.apply_chat_template(whole, add_generation_prompt=True)["input_ids"]
    # A marker that isn't special, which tokenizers find whatever they are told.
    tokenizer.add_tokens(["<mark>"])
    plain = document_tokenizer(tokenizer)
    ids = encode_chat(plain, [{"role": "user", "content": "a <mark> b"}])
    assert tokenizer.convert_tokens_to_ids("<mark>") not in ids
    assert "a <mark> b" in tokenizer.decode(ids)


def test_other_tokenizers_are_read_whole():
    """Truncation and padding that a file asks for are not for prompts; halves of characters are told."""
    _, tokenizer = served_pair("streaming")
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    plain = document_tokenizer(tokenizer)
    ids = plain.encode_document(PAGE[:200], complete=False)
    assert plain.decode(ids) == PAGE[:200]
    with pytest.raises(InputError, match="half of a character"):
        plain.encode_document("a \ud800 b", complete=False)
    tokenizer.chat_template = CHATML
    with pytest.raises(InputError, match="half of a character"):
        encode_chat(plain, [{"role": "user", "content": "a \ud800 b"}])


def test_chat_in_a_session(pair):
    """Each turn brings its new message alone; the conversation is as if it had been sent whole."""
    model, tokenizer = pair[0], copy.deepcopy(pair[1])
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    with (
        serving((model, tokenizer)) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):

        def ask(text: str):
            messages = [{"role": "user", "content": text}]
            return client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=6, temperature=0, extra_body={"session": "chat"}
            )

        first = ask("Who is there?")
        (session,) = running.service.sessions._cached.values()
        held = list(session.ids)
        second = ask("And why?")
        assert second.usage.prompt_tokens_details.cached_tokens == len(held) - 1
        assert session.ids[: len(held)] == held
        assert session.ids[len(held)] == tokenizer.sentence_end_token_id, "the answer's sentence is closed"
        assert session.ids.count(tokenizer.start_token_id) == 1
        whole = tokenizer.decode(session.ids)
        assert whole.startswith(f"user: Who is there? {first.choices[0].message.content}user: And why? ")
        assert whole.endswith(second.choices[0].message.content)


def test_many_short_messages_are_as_long_as_one_text():
    """Refused by the start of all that they say: the tokenizer reads none of them one by one."""
    model, tokenizer = tiny_pair()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": "It was late. He went home. "}] * 2_000
    with serving((model, tokenizer), max_prompt_tokens=100) as running, httpx.Client(timeout=60) as http:
        body = {"model": "tiny", "messages": messages, "max_tokens": 1}
        answer = http.post(f"{running.url}/v1/chat/completions", json=body)
    assert answer.status_code == 413
    assert "54,000 characters, more than 100 tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("unit", ["“a. ", "\u3000", "word ", "\ufffd", '"'])
def test_a_text_of_megabytes_keeps_nobody_waiting(unit):
    """As long as a body may be, of any characters: refused by its beginning, and the next client is served at once."""
    text = unit * ((8 << 20) // len(json.dumps(unit)[1:-1]) - 50)
    with serving(tiny_pair()) as running, httpx.Client(timeout=60) as http:
        started = time.process_time()
        answer = http.post(f"{running.url}/v1/completions", json={"model": "tiny", "prompt": text})
        assert answer.status_code == 400
        assert "more than 512 tokens" in answer.json()["error"]["message"]
        answer = http.post(f"{running.url}/v1/completions", json={"model": "tiny", "prompt": "It", "max_tokens": 2})
        assert answer.status_code == 200
        assert time.process_time() - started < 10, "seconds of work for what is refused"


def test_a_model_without_a_limit_has_one_here():
    with serving(tiny_pair(allow_extrapolation=True)) as running, httpx.Client(timeout=60) as http:
        started = time.process_time()
        body = {"model": "tiny", "prompt": "It was late. " * 400_000, "max_tokens": 1}
        answer = http.post(f"{running.url}/v1/completions", json=body)
        assert answer.status_code == 413
        assert "more than 131,072 tokens" in answer.json()["error"]["message"]
        assert time.process_time() - started < 10
        answer = http.post(f"{running.url}/v1/completions", json=body | {"prompt": "It was late. " * 60})
        assert answer.status_code == 200


def test_chat_by_template():
    model, tokenizer = tiny_pair()
    tokenizer = copy.deepcopy(tokenizer)
    added = tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = CHAT_TEMPLATE
    assert added == 2
    user, assistant = (tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|assistant|>"))
    with serving((model, tokenizer)) as running:
        seen = []
        original = running.service.scheduler.prepare
        running.service.scheduler.prepare = lambda prompt, params: seen.append(prompt) or original(prompt, params)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            messages = [{"role": "user", "content": "Who <|assistant|> is there?"}]
            done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
            assert done.choices[0].message.role == "assistant"
            ids = seen[0]
            assert ids[0] == tokenizer.start_token_id
            assert [ids.count(user), ids.count(assistant)] == [1, 1]
            assert ids[-1] == assistant
            assert tokenizer.decode(ids) == "Who <|assistant|> is there?"
            stream = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=5, temperature=0, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == done.choices[0].message.content
            with pytest.raises(openai.BadRequestError, match="text alone"):
                client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": [{"type": "image_url"}]}]
                )


def test_chat_without_a_template(client):
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])


def test_many_streams_with_people_who_leave(server, pair):
    """Whoever stays gets what they would have got alone, and nothing is left of the others."""
    count = int(os.environ.get("THOUGHTFORMER_STREAMS", "60"))
    chooser = random.Random(0)
    requests = [
        {
            "model": "tiny",
            "prompt": prose(300, seed=number)[: chooser.randint(0, 300)],
            "max_tokens": chooser.randint(1, 30),
            "temperature": chooser.choice([0, 1.0]),
            "seed": number,
            "stream": True,
        }
        for number in range(count)
    ]
    leaves = {number: chooser.randint(0, 5) for number in chooser.sample(range(count), count // 3)}

    async def one(http: httpx.AsyncClient, number: int) -> str | None:
        await asyncio.sleep(chooser.random() * 0.5)
        text, chunks = "", 0
        async with http.stream("POST", "/v1/completions", json=requests[number]) as response:
            if response.status_code != 200:
                raise AssertionError(await response.aread())
            async for line in response.aiter_lines():
                if number in leaves and chunks >= leaves[number]:
                    return None  # closes the connection
                if '"error"' in line:
                    assert number_of_cancelled
                    return None
                if line.startswith("data: {"):
                    chunks += 1
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    async def cancel_some() -> None:
        while len(number_of_cancelled) < count // 10:
            await asyncio.sleep(0.05)
            writing = [row for row in server.service.scheduler.batch.requests if row.number not in number_of_cancelled]
            if writing:
                row = chooser.choice(writing)
                number_of_cancelled.add(row.number)
                server.service.scheduler.cancel(row)

    number_of_cancelled: set[int] = set()

    async def all_of_them() -> list[str | None]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            cancelling = asyncio.create_task(cancel_some())
            try:
                return await asyncio.gather(*(one(http, number) for number in range(count)))
            finally:
                cancelling.cancel()

    texts = asyncio.run(all_of_them())
    server.settle()
    engine = Engine(*pair)
    stayed = [number for number in range(count) if texts[number] is not None]
    assert len(number_of_cancelled) > 1
    assert len(stayed) >= count - len(leaves) - len(number_of_cancelled)
    for number in stayed:
        request = requests[number]
        params = SamplingParams(max_new_tokens=request["max_tokens"], temperature=request["temperature"], seed=number)
        assert texts[number] == engine.generate([request["prompt"]], params)[0].text

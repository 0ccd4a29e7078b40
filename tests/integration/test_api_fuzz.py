"""Requests made from the API's own description, valid and not: no answer is a fault of the server's."""

from __future__ import annotations

import json
import os

import httpx
import hypothesis
import pytest
from hypothesis import strategies

from prose import tiny_pair
from serving import serving
from thoughtformer.engine import Limits

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("THOUGHTFORMER_FUZZ", "25"))
HEADERS = {"Content-Type": "application/json"}
POSTS = ("/v1/completions", "/v1/chat/completions")
ALL = (*(("POST", path) for path in POSTS), ("DELETE", "/v1/sessions/{name}"))


@pytest.fixture(scope="module")
def server():
    with serving(tiny_pair(), limits=Limits(max_rows=4), max_new_tokens=8, max_choices=4) as running:
        yield running


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"] in ("invalid_request_error", "rate_limit_error")


def fuzzed(test):
    return hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
    )(test)


@pytest.mark.parametrize("is_valid", [True, False], ids=["valid", "invalid"])
@pytest.mark.parametrize(("method", "path"), ALL)
def test_requests_from_the_schema(server, method, path, is_valid):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    mode = schemathesis.GenerationMode.POSITIVE if is_valid else schemathesis.GenerationMode.NEGATIVE
    operation = next(
        found.ok()
        for found in schema.get_all_operations()
        if (found.ok().method.upper(), found.ok().path) == (method, path)
    )

    @fuzzed
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def run(case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # another name is refused before anything else is looked at
        check(case.call(base_url=server.url))

    run()
    server.settle()


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(strategies.text(), inner, max_size=4),
    max_leaves=8,
)
KEYS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "session", "prompt", "logit_bias")


@fuzzed
@hypothesis.given(body=strategies.dictionaries(strategies.sampled_from(KEYS), JSON, max_size=4))
def test_any_value_for_any_key(server, body):
    whole = {"model": "tiny", "prompt": "The ferry", **body}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        check(http.post("/v1/completions", content=json.dumps(whole), headers=HEADERS))


@fuzzed
@hypothesis.given(content=strategies.binary(max_size=300))
def test_any_bytes(server, content):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for path in POSTS:
            answer = http.post(path, content=content, headers=HEADERS)
            assert answer.status_code == 400
            check(answer)

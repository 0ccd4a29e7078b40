"""The page in a real browser: by keyboard, stopped, without a server, with a token."""

from __future__ import annotations

import shutil

import pytest

from lms import served_pair
from prose import PAGE, tiny_pair
from serving import serving
from thoughtformer.engine import Engine
from thoughtformer.sampling import SamplingParams

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
sync_api = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(30_000)
    mistakes: list[str] = []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    yield page
    page.close()
    assert not mistakes


def status(page, begins: str) -> str:
    page.wait_for_function("text => document.getElementById('status').textContent.startsWith(text)", arg=begins)
    return page.inner_text("#status")


def test_writing_by_keyboard(pair, page):
    with serving(pair) as running:
        page.goto(running.url)
        page.wait_for_function("document.getElementById('model').textContent === 'tiny'")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(PAGE[:150])
        for _ in range(2):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "temperature"
        page.keyboard.press("Control+A")
        page.keyboard.type("0")
        page.keyboard.press("Control+Enter")
        assert status(page, "Done") == "Done: as long as asked for."
        done = Engine(*pair).generate([PAGE[:150]], SamplingParams(max_new_tokens=120))[0]
        assert page.text_content("#output") == done.text
        closed = done.usage.prompt_sentence_ends + done.usage.new_sentence_ends
        assert page.inner_text("#closed") == str(closed)
        assert page.locator("#sentences li:not(.open)").count() == closed
        assert page.locator("#sentences li.open").count() == 1
        assert page.inner_text("#plain").endswith(")")
        assert page.inner_text("#first").endswith(" ms")
        assert page.inner_text("#cached") == f"0 of {done.usage.prompt_tokens}"
        running.settle()


def test_a_compressed_model(page):
    """Spans fold as they are told; what is kept of the start stays in full."""
    pair = served_pair("sentinel_sentences")
    with serving(pair) as running:
        page.goto(running.url)
        page.wait_for_function("document.getElementById('model').textContent === 'tiny'")
        page.fill("#prompt", PAGE[:200])
        page.fill("#temperature", "0")
        page.keyboard.press("Control+Enter")
        status(page, "Done")
        done = Engine(*pair).generate([PAGE[:200]], SamplingParams(max_new_tokens=120))[0]
        assert page.text_content("#output") == done.text
        kept, *folded, rest = page.locator("#sentences li").evaluate_all("items => items.map(item => item.title)")
        assert (kept, rest) == ("", "")
        shown = page.locator("#sentences li").all_text_contents()
        assert shown[0] + "".join(folded) + shown[-1] == PAGE[:200] + done.text
        assert page.inner_text("#closed") == str(len(folded))
        assert len(folded) > 5


def test_stopping(pair, page):
    with serving(pair) as running:
        page.goto(running.url)
        page.fill("#max_tokens", "400")
        page.fill("#prompt", "The ferry")
        page.fill("#temperature", "0")  # a text that doesn't end by itself
        page.click("#write")
        status(page, "Writing")
        assert page.is_disabled("#write")
        page.keyboard.press("Escape")
        assert status(page, "Stopped") == "Stopped."
        assert page.is_enabled("#write")
        running.settle()
        assert running.service.scheduler.stats().finished.get("cancelled") == 1
        page.fill("#max_tokens", "5")
        page.click("#write")
        status(page, "Done")


def test_mistakes_and_lost_connections(pair, page):
    with serving(pair) as running:
        page.goto(running.url)
        page.fill("#max_tokens", "4000")
        page.click("#write")
        assert "trained for 512" in status(page, "prompt (")
        assert "wrong" in (page.get_attribute("#status", "class") or "")
        page.fill("#max_tokens", "5")
        page.route("**/v1/completions", lambda route: route.abort())
        page.click("#write")
        status(page, "No connection to the server")
        page.unroute("**/v1/completions")
        # The server goes away between two events.
        half = 'data: {"choices": [{"text": "half", "finish_reason": null}]}\n\n'
        page.route("**/v1/completions", lambda route: route.fulfill(status=200, body=half))
        page.click("#write")
        assert status(page, "the connection") == "the connection broke off"
        assert page.text_content("#output") == "half"
        page.unroute("**/v1/completions")
        page.click("#write")
        status(page, "Done")
    page.click("#write")
    status(page, "No connection to the server")


def test_a_token_is_asked_for(pair, page):
    with serving(pair, token="sesame") as running:
        page.goto(running.url)
        page.wait_for_selector("#token")
        assert page.inner_text("#model") == "wants a bearer token"
        page.fill("#token", "sesame")
        page.keyboard.press("Tab")
        page.wait_for_function("document.getElementById('model').textContent === 'tiny'")
        page.fill("#max_tokens", "5")
        page.click("#write")
        status(page, "Done")

"""The commands as processes of their own, killed in the middle of writing, or asked to stop."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from prose import prose, tiny_pair
from thoughtformer.cli import main
from thoughtformer.engine import SentenceStore, Sessions
from thoughtformer.runners.opening import runner_of
from thoughtformer.sampling import SamplingParams

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
KILLS = int(os.environ.get("THOUGHTFORMER_KILLS", "4"))
NAMES = ("one", "two", "../three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model on disk, small enough to load in no time."""
    model, tokenizer = tiny_pair()
    folder = tmp_path_factory.mktemp("model")
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def started(log: Path, *arguments: object) -> int:
    """A process that runs a command; it has everything imported already."""
    child = os.fork()
    if child:
        return child
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["thoughtformer", *map(str, arguments)]
        main()
    except SystemExit as exit_:
        sys.stdout.flush()
        os._exit(int(exit_.code or 0))
    finally:
        os._exit(99)


def ended(child: int, seconds: float = 30.0) -> int | None:
    """Its exit code, negative for a signal; None if it doesn't end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Server:
    """`thoughtformer serve` as a process."""

    def __init__(self, folder: Path, place: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = place / "log"
        # So little memory for sessions that each is written after every request.
        self.child = started(
            self.log,
            *("serve", "--model", folder, "--name", "tiny", "--port", self.port, "--threads", 1),
            *("--store", place / "store", "--sessions", place / "sessions", "--session-size", "1KiB"),
        )
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def ask(self, name: str, text: str) -> httpx.Response:
        body = {"model": "tiny", "prompt": text, "max_tokens": 4, "session": name, "temperature": 0}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)


def test_a_server_killed_again_and_again(folder, tmp_path):
    """Whatever it was writing: sessions load as some request left them, and the store verifies."""
    statuses: list[int] = []

    def talk(server: Server, name: str) -> None:
        with contextlib.suppress(httpx.HTTPError):
            for turn in range(1000):
                response = server.ask(name, prose(60, seed=turn))
                statuses.append(response.status_code)
                if response.status_code == 400:  # longer than the model was trained for
                    assert httpx.delete(f"{server.url}/v1/sessions/{name.replace('/', '%2F')}").status_code == 200

    model, tokenizer = tiny_pair()
    runner = runner_of(model.float(), tokenizer)
    found = 0
    for attempt in range(KILLS):
        server = Server(folder, tmp_path)
        threads = [threading.Thread(target=talk, args=(server, name)) for name in NAMES]
        for thread in threads:
            thread.start()
        chooser, before = random.Random(attempt), len(statuses)
        enough = chooser.randint(2, 8)
        while len(statuses) < before + enough and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        time.sleep(chooser.uniform(0, 0.2))
        server.kill()
        for thread in threads:
            thread.join()
        with SentenceStore(tmp_path / "store") as store:
            assert store.verify() == 0
        kept = Sessions(runner, folder=tmp_path / "sessions")
        for name in NAMES:
            if kept.has(name):
                found += 1
                session, _ = kept.begin(name, "", SamplingParams(max_new_tokens=1))
                assert session.cache is not None
                assert 0 < session.num_read <= len(session.ids)
        assert not [file.name for file in (tmp_path / "sessions").iterdir() if file.name.startswith(".")]
    assert found >= KILLS
    assert statuses.count(200) >= 2 * KILLS
    assert set(statuses) <= {200, 400}, "no session was refused"
    with SentenceStore(tmp_path / "store") as store:
        assert store.stats().sentences > 0


def test_an_indexer_killed_again_and_again(folder, tmp_path):
    texts = [tmp_path / f"{number}.txt" for number in range(20)]
    store_folder = tmp_path / "store"
    arguments = ("index", "--model", folder, "--store", store_folder, "--threads", 1, *texts)

    def write_texts(attempt: int) -> None:
        """Sentences that no earlier attempt had."""
        for number, text in enumerate(texts):
            words = prose(3000, seed=attempt).split()
            text.write_text(" ".join(f"{word} {attempt} {number} {place}." for place, word in enumerate(words)))

    held = []
    for attempt in range(KILLS):
        write_texts(attempt)
        child = started(tmp_path / "log", *arguments)
        # Until it writes; then a little longer.
        until = time.monotonic() + 60
        while not any(file.stat().st_size for file in store_folder.glob("*-wal")):
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.002)
        time.sleep(random.Random(attempt).choice([0.0, 0.01, 0.05, 0.2]))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with SentenceStore(store_folder) as store:
            assert store.verify() == 0
            held.append(store.stats().sentences)
    assert held == sorted(held), "what was written stays"
    assert held[-1] > 0
    assert ended(started(tmp_path / "log", *arguments, "--json"), 120) == 0
    with SentenceStore(store_folder) as store:
        assert store.verify() == 0
        assert store.stats().sentences > held[-1]


def test_a_server_asked_to_stop(folder, tmp_path):
    """SIGTERM amid streams: they are told, sessions are saved, and the process ends in peace."""
    server = Server(folder, tmp_path)
    assert server.ask("kept", "The ferry").status_code == 200
    body = {"model": "tiny", "prompt": "The ferry", "max_tokens": 480, "stream": True, "temperature": 0}
    lines: list[str] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 5:
                os.kill(server.child, signal.SIGTERM)
    assert ended(server.child) in (0, -signal.SIGTERM), server.log.read_text()
    told = [line for line in lines if line.startswith("data: ")]
    assert '"error"' in told[-1] or told[-1] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    model, tokenizer = tiny_pair()
    assert Sessions(runner_of(model.float(), tokenizer), folder=tmp_path / "sessions").has("kept")
    assert "Traceback" not in server.log.read_text()

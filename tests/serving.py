"""A real server in a thread, for the tests of HTTP and of the page."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from thoughtformer.decode import Drafter
from thoughtformer.engine import Limits, Scheduler, SentenceStore, Sessions, runner_of
from thoughtformer.models import GPTHFForCausalLM
from thoughtformer.serve import ServeSettings, Service, create_app
from thoughtformer.text import SentenceTokenizer


class Running:
    """A server that answers at `url`."""

    def __init__(self, service: Service, server: uvicorn.Server, port: int) -> None:
        self.service = service
        self.server = server
        self.url = f"http://127.0.0.1:{port}"

    def settle(self, seconds: float = 30.0) -> None:
        """Waits until nothing is in work, and checks that nothing is left."""
        until = time.monotonic() + seconds
        while self.service.scheduler.has_work and time.monotonic() < until:
            time.sleep(0.01)
        stats = self.service.scheduler.stats()
        assert (stats.waiting, stats.reading, stats.running, stats.cache_bytes) == (0, 0, 0, 0), stats


@contextmanager
def serving(
    pair: tuple[GPTHFForCausalLM, SentenceTokenizer],
    *,
    limits: Limits | None = None,
    store: SentenceStore | None = None,
    folder=None,
    drafter: Drafter | None = None,
    **settings,
) -> Iterator[Running]:
    """Serves a model as "tiny" at a free port."""
    model, tokenizer = pair
    runner = runner_of(model, tokenizer, sentences=None if store is None else store.of(model))
    scheduler = Scheduler(runner, limits or Limits(), drafters=[drafter] if drafter else [])
    service = Service(
        scheduler, Sessions(scheduler.runner, folder=folder), ServeSettings(model_name="tiny", **settings)
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(service, server, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()
        assert not service.worker.is_alive

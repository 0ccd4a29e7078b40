"""A scheduler's rounds in a thread of their own, so that requests can come and go from others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from thoughtformer.engine.rows import Row
from thoughtformer.engine.scheduler import Scheduler

__all__ = ["Worker"]

IDLE_SECONDS = 1.0


class Worker:
    """Runs a scheduler until it is stopped; use it as a context manager.

    Args:
        scheduler: whose rounds are run.
        on_idle: called about once a second, in the worker's thread.
    """

    def __init__(self, scheduler: Scheduler, *, on_idle: Callable[[], None] | None = None) -> None:
        self.scheduler = scheduler
        self.on_idle = on_idle
        self.error: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="thoughtformer-worker", daemon=True)

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are worked on."""
        return self._thread.is_alive() and self.error is None

    def stop(self, timeout: float = 30.0) -> None:
        """Ends after the round under way; requests still in work end as cancelled."""
        self._stopping.set()
        self._thread.join(timeout)

    def cancel(self, row: Row) -> None:
        """See `Scheduler.cancel`."""
        self.scheduler.cancel(row)

    def _run(self) -> None:
        idle = time.monotonic()
        try:
            while not self._stopping.is_set():
                if self.scheduler.wait_for_work(IDLE_SECONDS):
                    self.scheduler.round()
                if self.on_idle is not None and time.monotonic() - idle >= IDLE_SECONDS:
                    self.on_idle()
                    idle = time.monotonic()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.scheduler.cancel_all()

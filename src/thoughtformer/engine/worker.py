"""A scheduler's rounds in a thread of their own, so that requests can come and go from others."""

from __future__ import annotations

import logging
import threading

from thoughtformer.engine.scheduler import Scheduler

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

#: How long a stop may go unnoticed.
IDLE_SECONDS = 0.5


class Worker:
    """Runs a scheduler until it is stopped; use it as a context manager.

    Args:
        scheduler: whose rounds are run; it takes on nothing more once the worker has ended.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
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
        if self._thread.is_alive():
            logger.error("a round takes longer than %g seconds: its requests are left to it", timeout)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if self.scheduler.wait_for_work(IDLE_SECONDS):
                    self.scheduler.round()
        except BaseException as error:
            self.error = error
            logger.exception("the engine's thread has ended")
            raise
        finally:
            self.scheduler.close()

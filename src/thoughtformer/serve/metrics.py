"""Where the engine stands, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from thoughtformer.serve.service import Service

__all__ = ["Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry a server, so that several may live in a process."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self.registry.register(self)  # type: ignore[arg-type]
        self.first_token = Histogram(
            "thoughtformer_first_token_seconds",
            "From a request's submission to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "thoughtformer_request_seconds",
            "From a request's submission to its last token.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        stats, sessions = self.service.scheduler.stats(), self.service.sessions
        for name, text, value in (
            ("waiting_requests", "Requests that wait to be admitted.", stats.waiting),
            ("reading_requests", "Requests whose prompts are being read.", stats.reading),
            ("running_requests", "Requests being written.", stats.running),
            ("cache_bytes", "Held by requests in work.", stats.cache_bytes),
            ("sessions", "Sessions in memory.", sessions.num_cached()),
            ("session_bytes", "Held by sessions in memory.", sessions.num_bytes()),
        ):
            yield GaugeMetricFamily(f"thoughtformer_{name}", text, value=value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of admitted prompts.", stats.prompt_tokens),
            ("cached_prompt_tokens", "Of these, those that needn't be read.", stats.cached_prompt_tokens),
            ("new_tokens", "Tokens written.", stats.new_tokens),
            ("rounds", "Rounds of the scheduler.", stats.rounds),
            ("session_failures", "Sessions that couldn't be saved.", sessions.failures),
            ("store_failures", "Uses of the sentence store that failed.", self.service.store_failures),
        ):
            yield CounterMetricFamily(f"thoughtformer_{name}", text, value=value)
        for name, text, counts in (
            ("draft_tokens", "Drafted tokens that were verified, by strategy.", stats.drafts.verified),
            ("accepted_draft_tokens", "Of these, those that were chosen.", stats.drafts.right),
        ):
            by_strategy = CounterMetricFamily(f"thoughtformer_{name}", text, labels=["strategy"])
            for strategy, count in counts.items():
                by_strategy.add_metric([strategy], count)
            yield by_strategy
        finished = CounterMetricFamily("thoughtformer_requests", "Requests that have ended.", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)

"""Metrics of files and batches, beside those of the door."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from gateway.limits import WORDS
from l4queue.protocol.batch_records import ENDED, BatchState

__all__ = ("BatchMetrics",)


class BatchMetrics:
    """Counters of one gateway process; make it once for a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._unfinished = Gauge(
            "l4queue_http_batches", "Unfinished batches of the store, by state", ("state",), registry=registry
        )
        self._ended = Counter(
            "l4queue_http_batches_ended", "Batches that this gateway ended", ("state",), registry=registry
        )
        self._limited = Gauge(
            "l4queue_http_batches_limited",
            "Batches of this gateway that wait for a limit of their key",
            ("limit",),
            registry=registry,
        )
        self.limited({})
        for state in BatchState:
            (self._ended if state in ENDED else self._unfinished).labels(state.value)

    def unfinished(self, counts: Mapping[BatchState, int]) -> None:
        """The number of batches in each state, now."""
        for state in BatchState:
            if state not in ENDED:
                self._unfinished.labels(state.value).set(counts.get(state, 0))

    def limited(self, counts: Mapping[str, int]) -> None:
        """The number of batches that wait for each limit, now."""
        for limit in WORDS:
            self._limited.labels(limit).set(counts.get(limit, 0))

    def ended(self, state: BatchState) -> None:
        """Count a batch that this gateway brought to its end."""
        self._ended.labels(state.value).inc()

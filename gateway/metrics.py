"""Metrics of the door, beside those of vLLM's server at /metrics."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

__all__ = ("DoorMetrics",)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Of latencies. Chosen: from a cached token to a long answer."""


class DoorMetrics:
    """Counters of one gateway process; make it once. A caller is the name of its key."""

    def __init__(self) -> None:
        self._requests = Counter(
            "l4queue_http_requests", "Answers that began, by status", ("path", "status", "caller")
        )
        self._tokens = Counter("l4queue_http_output_tokens", "Tokens generated for callers", ("caller",))
        self._open = Gauge("l4queue_http_open_requests", "Requests that are being answered")
        self._first = Histogram(
            "l4queue_http_first_byte_seconds",
            "From a request to the first bytes of its answer",
            buckets=_BUCKETS_S,
        )

    @contextmanager
    def exchange(self, *, path: str, caller: str) -> Iterator[_Measured]:
        """Around the answer to one request."""
        self._open.inc()
        try:
            yield _Measured(self, path=path, caller=caller)
        finally:
            self._open.dec()

    def began(self, *, path: str, caller: str, status: int, after_s: float) -> None:
        """Count an answer."""
        self._requests.labels(path=path, status=str(status), caller=caller).inc()
        self._first.observe(after_s)

    def generated(self, *, caller: str, num_tokens: int) -> None:
        """Count tokens."""
        self._tokens.labels(caller=caller).inc(num_tokens)


class _Measured:
    """One exchange as it is measured."""

    def __init__(self, metrics: DoorMetrics, *, path: str, caller: str) -> None:
        self._metrics, self._path, self._caller = metrics, path, caller
        self._begun_s = time.monotonic()

    def watched(self, send: Send) -> Send:
        """The same `send`, which notes when and how the answer begins."""

        async def watching(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                after_s = time.monotonic() - self._begun_s
                status = int(message["status"])
                self._metrics.began(path=self._path, caller=self._caller, status=status, after_s=after_s)
            await send(message)

        return watching

    def generated(self, num_tokens: int) -> None:
        """Note the tokens of the answer."""
        self._metrics.generated(caller=self._caller, num_tokens=num_tokens)

"""Metrics of the door, beside those of vLLM's server at /metrics."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from gateway.exchange import Exchange
from gateway.refusals import reason_of

__all__ = ("DoorMetrics", "MeasuredExchange")

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Of latencies. Chosen: from a cached token to a long answer."""


class DoorMetrics:
    """Counters of one gateway process; make it once. A caller is the name of its key."""

    def __init__(self) -> None:
        self._requests = Counter(
            "l4queue_http_requests", "Answers that began, by status", ("path", "status", "caller")
        )
        self._prompts = Counter("l4queue_http_prompt_tokens", "Tokens of callers' prompts", ("caller",))
        self._tokens = Counter("l4queue_http_output_tokens", "Tokens generated for callers", ("caller",))
        self._refused = Counter("l4queue_http_refusals", "Answers that were errors, by why", ("caller", "reason"))
        self._open = Gauge("l4queue_http_open_requests", "Requests that are being answered")
        self._first = Histogram(
            "l4queue_http_first_byte_seconds",
            "From a request to the first bytes of its answer",
            buckets=_BUCKETS_S,
        )

    @contextmanager
    def exchange(self, *, path: str, caller: str) -> Iterator[MeasuredExchange]:
        """Around the answer to one request."""
        self._open.inc()
        try:
            yield MeasuredExchange(self, path=path, caller=caller)
        finally:
            self._open.dec()

    def began(self, *, path: str, caller: str, status: int, after_s: float) -> None:
        """Count an answer."""
        self._requests.labels(path=path, status=str(status), caller=caller).inc()
        self._first.observe(after_s)

    def used(self, *, caller: str, prompt_tokens: int, output_tokens: int) -> None:
        """Count tokens."""
        self._prompts.labels(caller=caller).inc(prompt_tokens)
        self._tokens.labels(caller=caller).inc(output_tokens)

    def refused(self, *, caller: str, reason: str) -> None:
        """Count a refusal."""
        self._refused.labels(caller=caller, reason=reason).inc()


class MeasuredExchange:
    """One exchange as it is measured; `exchange` is what it asks for, once that is known."""

    def __init__(self, metrics: DoorMetrics, *, path: str, caller: str) -> None:
        self._metrics, self._path, self._caller = metrics, path, caller
        self._begun_s = time.monotonic()
        self.exchange: Exchange | None = None

    def watched(self, send: Send) -> Send:
        """The same `send`, which notes when and how the answer begins."""

        async def watching(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                after_s = time.monotonic() - self._begun_s
                status = int(message["status"])
                self._metrics.began(path=self._path, caller=self._caller, status=status, after_s=after_s)
                if status >= HTTPStatus.BAD_REQUEST:
                    known = self.exchange and self.exchange.refusal
                    reason = known.reason if known else reason_of(status)
                    self._metrics.refused(caller=self._caller, reason=reason)
            await send(message)

        return watching

    def ended(self) -> None:
        """Note the tokens of prompts and answer."""
        if self.exchange is not None:
            output_tokens = sum(tokens for tokens, _ in self.exchange.places.values())
            self._metrics.used(
                caller=self._caller,
                prompt_tokens=self.exchange.num_prompt_tokens,
                output_tokens=output_tokens,
            )

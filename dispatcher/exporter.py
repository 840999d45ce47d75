"""Entry point of the metrics exporter: `python -m dispatcher.exporter`. One serves the whole deployment.

Everything comes from Redis, so that no dispatcher or worker counts what another one counts too.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from threading import Event, Lock
from typing import TYPE_CHECKING

from dispatcher.monitoring.families import describe
from dispatcher.monitoring.latency import Latencies
from l4queue.config import Settings, load_settings
from l4queue.errors import ConfigError, L4QueueError
from l4queue.failure import fail
from l4queue.logs import start_logging, take_log_format
from l4queue.metrics import Families, MetricsServer
from l4queue.model_config import with_model_facts
from l4queue.observe.telemetry import read_telemetry
from l4queue.policy.autoscale import FleetDemand
from l4queue.protocol.executor import Executor

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ("Exporter", "main", "serve")

log = logging.getLogger("l4queue.exporter")
_FOLLOW_S = 1.0  # the stream of outcomes holds 20,000: so much may finish between two looks
_RETRY_S = 2.0
"""How long a look tries again when Redis is away, s. Chosen: well below the 10 s that Prometheus waits for a
scrape."""


class Exporter:
    """A source of metrics: reads Redis when it is scraped, and follows the outcomes in between."""

    def __init__(self, settings: Settings, executor: Executor) -> None:
        self._settings = settings
        self._executor = executor
        self._latencies = Latencies(executor, settings.namespace)
        self._last_known: FleetDemand | None = None
        self._one_at_a_time = Lock()

    def follow(self) -> None:
        """Count what has finished since the last look. Redis may be away."""
        with self._one_at_a_time:
            try:
                self._latencies.follow()
            except L4QueueError as error:
                log.debug("cannot follow what finishes: %s", error)  # the executor has said so

    def collect(self) -> Iterator[Metric]:
        """All of it; while Redis is away only that it is, and the latencies seen so far."""
        families = Families()
        with self._one_at_a_time:
            try:
                self._latencies.follow()
                telemetry = read_telemetry(self._executor, self._settings.namespace)
            except L4QueueError as error:
                log.debug("cannot read the deployment: %s", error)
                telemetry = None
            families.gauge("redis_up", "Whether the exporter can read Redis", {(): float(telemetry is not None)})
            self._latencies.describe(families)
            if telemetry is not None:
                demand = describe(families, telemetry, self._settings, last_known=self._last_known)
                if demand.ratio is not None:
                    self._last_known = demand
        yield from families.found


def serve(settings: Settings) -> None:
    """Serve until a signal."""
    if not settings.metrics_port:
        raise ConfigError("L4_METRICS_PORT: the exporter needs a port to serve, for example 9400")
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        settings = with_model_facts(settings)
    except ConfigError as error:  # dispatchers and workers end of it
        log.warning("lengths are told up to %d tokens: %s", settings.max_model_len, error)
    executor = Executor(settings.redis_url, retry_s=_RETRY_S, says_outages=True)
    exporter = Exporter(settings, executor)
    try:
        with MetricsServer(settings, exporter):
            log.info("exporter ready: namespace %s", settings.namespace)
            exporter.follow()
            while not stopping.wait(_FOLLOW_S):
                exporter.follow()
    finally:
        executor.close()


def main(arguments: Sequence[str] = ()) -> int:
    """Entry point; the exit code says whether it ended well. `--log-format` wins over L4_LOG_FORMAT."""
    take_log_format(arguments)
    try:
        settings = load_settings()
        start_logging(settings.log_format)
        serve(settings)
    except L4QueueError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Metrics of one process over HTTP, for Prometheus. Without a port there are none, and nothing is imported."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeAlias

from l4queue.config import Settings
from l4queue.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ("Families", "Labels", "MetricsServer", "Source", "Tally", "Values")

log = logging.getLogger("l4queue.metrics")
_PREFIX = "l4queue_"

Labels: TypeAlias = tuple[str, ...]
"""Values of labels, in the order of their names; `()` without labels."""

Values: TypeAlias = Mapping[Labels, float]


class Tally:
    """Values counted by upper bounds, as a Prometheus histogram has them. One thread writes, others may read."""

    __slots__ = ("bounds", "numbers", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.numbers = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float, *, number: int = 1) -> None:
        """Count a value, `number` times."""
        self.numbers[bisect_left(self.bounds, value)] += number
        self.total += value * number


class Families:
    """Metric families of one scrape, prefixed with `l4queue_`."""

    def __init__(self) -> None:
        self.found: list[Metric] = []

    def gauge(self, name: str, meaning: str, values: Values, *, labels: Sequence[str] = ()) -> None:
        """A metric that goes up and down."""
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(_PREFIX + name, meaning, labels=labels)
        for which, value in values.items():
            family.add_metric(which, value)
        self.found.append(family)

    def counter(self, name: str, meaning: str, values: Values, *, labels: Sequence[str] = ()) -> None:
        """A metric that only grows; its samples end in `_total`."""
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(_PREFIX + name, meaning, labels=labels)
        for which, value in values.items():
            family.add_metric(which, value)
        self.found.append(family)

    def summary(
        self,
        name: str,
        meaning: str,
        values: Mapping[Labels, tuple[int, float]],
        *,
        labels: Sequence[str] = (),
    ) -> None:
        """How many values, and their sum."""
        from prometheus_client.core import SummaryMetricFamily

        family = SummaryMetricFamily(_PREFIX + name, meaning, labels=labels)
        for which, (number, total) in values.items():
            family.add_metric(which, number, total)
        self.found.append(family)

    def histogram(
        self, name: str, meaning: str, values: Mapping[Labels, Tally], *, labels: Sequence[str] = ()
    ) -> None:
        """Values by their upper bounds."""
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(_PREFIX + name, meaning, labels=labels)
        for which, tally in values.items():
            bounds = [*(str(float(bound)) for bound in tally.bounds), "+Inf"]
            pairs = list(zip(bounds, map(float, accumulate(list(tally.numbers))), strict=True))
            family.add_metric(which, pairs, tally.total)
        self.found.append(family)


class Source(Protocol):
    """Where metrics come from. `collect` is called in a thread of the server, once for each scrape."""

    def collect(self) -> Iterable[Metric]: ...


class _Undescribed:
    """A source whose families are not known before they are collected: else it would be asked when registered."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._source.collect()


class MetricsServer:
    """Serves what its sources collect, with the process's own figures and those of vLLM where it runs.

    `with MetricsServer(settings, source): ...`; it does nothing when `metrics_port` is 0. ConfigError when the
    port is taken: processes on one host need ports of their own.
    """

    def __init__(self, settings: Settings, *sources: Source) -> None:
        self._settings = settings
        self._sources = [_Undescribed(source) for source in sources]

    def __enter__(self) -> MetricsServer:
        host, port = self._settings.metrics_host, self._settings.metrics_port
        if not port:
            return self
        from prometheus_client import REGISTRY, start_http_server

        try:
            self._server, self._thread = start_http_server(port, host)
        except OSError as error:
            raise ConfigError(
                f"L4_METRICS_PORT: cannot listen on {host}:{port} ({error.strerror or error}); "
                "each process of a host needs a port of its own, 0 for none"
            ) from None
        for source in self._sources:
            REGISTRY.register(source)
        log.info("metrics at http://%s:%d/metrics", host, port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settings.metrics_port:
            from prometheus_client import REGISTRY

            for source in self._sources:
                REGISTRY.unregister(source)
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

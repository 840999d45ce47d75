"""Metrics over HTTP: the text that Prometheus reads, ports that are taken, ports that are off."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.monitoring.latency import Latencies, length_class
from dispatcher.routing.metrics import RouterCounters
from l4queue.cli.stack.embedded import free_port
from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.metrics import Families, MetricsServer, Tally
from l4queue.protocol.reads import FinishedRequest


class Source:
    """One family of each kind."""

    def collect(self) -> Iterator[Metric]:
        tally = Tally((0.5, 1.0))
        for value in (0.2, 0.5, 0.7, 3.0):
            tally.add(value)
        families = Families()
        families.gauge("depth", "Depth", {("0",): 2.0, ("1",): 3.0}, labels=("stage",))
        families.counter("steps", "Steps", {(): 7.0})
        families.summary("gap_seconds", "Gaps", {(): (2, 0.5)})
        families.histogram("wait_seconds", "Waits", {(): tally})
        yield from families.found


def scrape(port: int) -> dict[str, float]:
    """Samples by name and labels, as a parser of the text format reads them."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as reply:
        text = reply.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found["|".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_what_is_collected_is_served() -> None:
    """Bounds belong to the bucket below; buckets add up; the process's own figures come along."""
    settings = Settings(metrics_port=free_port())
    with MetricsServer(settings, Source()):
        found = scrape(settings.metrics_port)

    assert (found["l4queue_depth|0"], found["l4queue_depth|1"], found["l4queue_steps_total"]) == (2, 3, 7)
    assert (found["l4queue_gap_seconds_count"], found["l4queue_gap_seconds_sum"]) == (2, 0.5)
    buckets = [found[f"l4queue_wait_seconds_bucket|{le}"] for le in ("0.5", "1.0", "+Inf")]
    assert buckets == [2, 3, 4]
    assert found["l4queue_wait_seconds_sum"] == pytest.approx(4.4)
    assert found["process_resident_memory_bytes"] > 1e6


def test_the_port_is_free_again_afterwards() -> None:
    """And without a port there is no server at all."""
    settings = Settings(metrics_port=free_port())
    for _ in range(2):
        with MetricsServer(settings, Source()):
            scrape(settings.metrics_port)
    with pytest.raises(URLError):
        scrape(settings.metrics_port)
    with MetricsServer(Settings(metrics_port=0), Source()):
        pass


def test_a_port_that_is_taken_is_an_error_that_names_the_setting() -> None:
    """Two workers of one host with the same port."""
    settings = Settings(metrics_port=free_port())
    with MetricsServer(settings, Source()), pytest.raises(ConfigError, match=r"L4_METRICS_PORT.*its own"):
        MetricsServer(settings, Source()).__enter__()


@pytest.mark.parametrize(
    ("prompt_tokens", "expected"),
    [(0, "0-255"), (255, "0-255"), (256, "256-2047"), (2048, "2048-16383"), (16_384, "16384+"), (10**6, "16384+")],
)
def test_length_classes_are_half_open(prompt_tokens: int, expected: str) -> None:
    """As stages are: a bound belongs to the class above."""
    assert length_class(prompt_tokens) == expected


def finished(**over: object) -> FinishedRequest:
    """Accepted at 1 s, started at 2 s, first token at 3 s, done at 7 s with 5 tokens."""
    given: dict[str, object] = {
        "request_id": "a", "state": "done", "prompt_tokens": 300, "output_tokens": 5, "submitted_ms": 1000,
        "started_ms": 2000, "first_token_ms": 3000, "finished_ms": 7000, "stage": "1", "worker": "w",
    }  # fmt: skip
    return FinishedRequest(**(given | over))  # type: ignore[arg-type]


def test_latencies_are_those_of_the_definitions() -> None:
    """f - a, (d - f) / (o - 1) for o ≥ 2, d - a; only of requests that were answered."""
    latencies = Latencies(executor=None, namespace="l4")  # type: ignore[arg-type]
    latencies.take([finished(), finished(output_tokens=1, first_token_ms=7000), finished(state="failed")])
    latencies.take([finished(state="done", started_ms=None, first_token_ms=None, output_tokens=0, stage="0")])

    which = ("1", "256-2047")
    assert (latencies.wait[which].total, sum(latencies.wait[which].numbers)) == (2.0, 2)
    assert (latencies.first_token[which].total, sum(latencies.first_token[which].numbers)) == (8.0, 2)
    assert (latencies.per_token[which].total, sum(latencies.per_token[which].numbers)) == (1.0, 1)
    assert (latencies.end_to_end[which].total, sum(latencies.end_to_end[which].numbers)) == (12.0, 2)
    assert sum(latencies.end_to_end["0", "256-2047"].numbers) == 1
    assert set(latencies.first_token) == {which}


def test_a_dispatcher_tells_reasons_that_have_not_happened_too() -> None:
    """A rate needs a zero before the first one; own queues of workers are one."""
    figures = RouterCounters()
    for stage in ("0", "@w1", "@w2"):
        figures.count_routed(stage)
    figures.refused["too_long"] += 1

    samples = {(s.name, *s.labels.values()): s.value for family in figures.collect() for s in family.samples}

    assert samples["l4queue_dispatcher_requests_routed_total", "worker"] == 2
    assert samples["l4queue_dispatcher_requests_refused_total", "too_long"] == 1
    assert samples["l4queue_dispatcher_requests_refused_total", "invalid"] == 0

"""Prometheus metrics of one worker process, put together at each scrape. Nothing is counted on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import JsonValue

from l4queue.metrics import Families, Labels, Tally, Values
from l4queue.models import WorkerLoad
from workers.telemetry.snapshot import WorkerSnapshot

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ("WorkerMetrics",)

_WORKER = ("worker",)


class WorkerMetrics:
    """A source of metrics of all workers of this process, each under its id."""

    def __init__(
        self, snapshots: Callable[[], list[WorkerSnapshot]], events: Callable[[], Mapping[str, JsonValue]]
    ) -> None:
        self._snapshots = snapshots
        self._events = events

    def collect(self) -> Iterator[Metric]:
        """Everything; before the engines have started only that they have not."""
        families = Families()
        found = {one.load.worker_id: one for one in self._snapshots()}
        families.gauge("worker_engines", "Engines of this process that have started", {(): len(found)})
        _state(_Rows(families, found, "worker_"))
        _engine(_Rows(families, found, "engine_"))
        _steps(families, found)
        dropped = self._events().get("events_dropped", 0)
        families.counter(
            "worker_events_dropped",
            "Celery events that Flower did not get because the broker was away or slow",
            {(): float(dropped) if isinstance(dropped, int | float) else 0.0},
        )
        yield from families.found


class _Rows:
    """Families with one value for each worker."""

    def __init__(self, families: Families, found: Mapping[str, WorkerSnapshot], prefix: str) -> None:
        self._families = families
        self._found = found
        self._prefix = prefix

    def gauge(self, name: str, meaning: str, value: Callable[[WorkerSnapshot], float]) -> None:
        self._families.gauge(self._prefix + name, meaning, self._values(value), labels=_WORKER)

    def counter(self, name: str, meaning: str, value: Callable[[WorkerSnapshot], float]) -> None:
        self._families.counter(self._prefix + name, meaning, self._values(value), labels=_WORKER)

    def _values(self, value: Callable[[WorkerSnapshot], float]) -> Values:
        return {(worker_id,): float(value(one)) for worker_id, one in self._found.items()}


def _state(rows: _Rows) -> None:
    rows.gauge("stage", "Stage that it serves", lambda one: one.load.stage)
    rows.gauge("plan_version", "Plan that it follows", lambda one: one.plan_version)
    rows.gauge("draining", "Whether it takes nothing more", lambda one: one.load.is_draining)
    rows.gauge("running_requests", "Requests that it runs", lambda one: one.load.num_running)
    rows.gauge("running_limit_requests", "Most requests that it runs", lambda one: one.load.max_running)
    rows.gauge("free_requests", "Requests that it has slots for", lambda one: _free(one.load))
    rows.gauge("context_tokens", "Context tokens of its requests", lambda one: one.load.context_tokens)
    rows.gauge("pending_prefill_tokens", "Of those without a token", lambda one: one.load.pending_prefill_tokens)
    rows.counter("requests_settled", "Requests that ended here", lambda one: one.load.num_finished)
    rows.counter("prompt_tokens", "Of requests that began here and whose cache is told", _prompt_tokens)
    rows.counter("cached_tokens", "Of these, found in the prefix cache", lambda one: one.load.num_cached_tokens)
    rows.counter("requests_stolen", "Waiting requests taken from other stages", lambda one: one.num_stolen)
    rows.counter("requests_handed_over", "Requests that left for the next stage", lambda one: one.num_handed_over)


def _prompt_tokens(one: WorkerSnapshot) -> int:
    return one.load.num_prompt_tokens


def _free(load: WorkerLoad) -> int:
    return max(0, load.max_running - load.num_running)


def _engine(rows: _Rows) -> None:
    rows.gauge("waiting_requests", "Requests without a place in the batch", lambda one: one.engine.num_waiting)
    rows.gauge("kv_used_tokens", "KV cache in use", lambda one: one.load.kv_used_tokens)
    rows.gauge("kv_capacity_tokens", "KV cache", lambda one: one.load.kv_capacity_tokens)
    rows.gauge("kv_usage_ratio", "Share of the KV cache in use", lambda one: one.load.kv_share)
    rows.counter("preemptions", "Requests put back for want of KV cache", lambda one: one.engine.num_preemptions)
    rows.counter("kv_loads", "Arrivals whose KV cache was read", lambda one: one.engine.num_kv_loads)
    rows.counter("kv_misses", "Arrivals prefilled although KV was kept", lambda one: one.engine.num_kv_misses)
    rows.counter("kv_loaded_bytes", "KV cache read for arrivals", lambda one: one.engine.kv_loaded_bytes)


def _steps(families: Families, found: Mapping[str, WorkerSnapshot]) -> None:
    seconds: dict[Labels, Tally] = {}
    for worker_id, one in found.items():
        seconds[worker_id, "decode"] = one.steps.decode_s
        seconds[worker_id, "prefill"] = one.steps.prefill_s
    families.histogram(
        "engine_step_seconds",
        "Time of an engine step; kind prefill: with prompt tokens in it",
        seconds,
        labels=(*_WORKER, "kind"),
    )
    tokens: Values = {(i, kind): n for i, one in found.items() for kind, n in _tokens(one)}
    families.counter("engine_tokens", "Tokens computed, also again", tokens, labels=(*_WORKER, "kind"))
    errors: dict[Labels, tuple[int, float]] = {
        (i,): (one.steps.num_predicted, one.steps.error_ratio_sum) for i, one in found.items()
    }
    families.summary(
        "cost_model_error_ratio",
        "Relative error of the predicted step time: |predicted - measured| / measured",
        errors,
        labels=_WORKER,
    )
    rows = _Rows(families, found, "cost_model_")
    rows.counter("predicted_seconds", "Sum of predicted step times", lambda one: one.steps.predicted_s)
    rows.gauge(
        "calibrated",
        "Whether the cost model is the engine's own; else that of the coefficient file",
        lambda one: one.is_calibrated,
    )


def _tokens(one: WorkerSnapshot) -> tuple[tuple[str, float], ...]:
    return ("prefill", one.steps.prefill_tokens), ("decode", one.steps.decode_tokens)

"""Steps held against the cost model, and what of them a scrape shows."""

from __future__ import annotations

import pytest

from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from workers.engine.base import EngineStats, StepRecord
from workers.telemetry.metrics import WorkerMetrics
from workers.telemetry.snapshot import StepMeter, WorkerSnapshot

COST = StepCost(alpha_ms=8.0, beta_ms=1.0, gamma_ms=0.0, pi_ms=0.1, psi_ms=0.0)


def step(elapsed_ms: float, *, decodes: int = 2, prefill: int = 0) -> StepRecord:
    """One step."""
    return StepRecord(
        elapsed_ms=elapsed_ms,
        num_decodes=decodes,
        context_tokens=100,
        prefill_tokens=prefill,
        prefill_pairs=0.0,
        skew_tokens=0.0,
    )


def meter() -> StepMeter:
    """Predicted 10, 10 and 20 ms; measured 8, 20 and 20; and one step that took no time."""
    meter = StepMeter()
    meter.add([step(8.0), step(20.0)], COST)
    meter.add([step(20.0, prefill=100), step(0.0)], COST)
    return meter


def test_errors_are_relative_to_what_was_measured() -> None:
    """2/8 too much, 10/20 too little, exact; a step without time cannot be judged."""
    found = meter()

    assert (found.num_predicted, found.error_ratio_sum) == (3, pytest.approx(0.75))
    assert found.predicted_s == pytest.approx(0.04)
    assert (found.prefill_tokens, found.decode_tokens) == (100, 8)
    assert (sum(found.decode_s.numbers), sum(found.prefill_s.numbers)) == (3, 1)
    assert found.decode_s.total == pytest.approx(0.028)


def figures(worker_id: str) -> WorkerSnapshot:
    """A worker that runs three of four."""
    load = WorkerLoad(
        worker_id=worker_id, stage=1, num_running=3, max_running=4, kv_used_tokens=25, kv_capacity_tokens=100
    )
    engine = EngineStats(num_running=3, num_waiting=1, kv_used_tokens=25, num_steps=4, last_step_ms=1.0)
    return WorkerSnapshot(
        load=load,
        engine=engine,
        steps=meter(),
        plan_version=7,
        num_stolen=2,
        num_handed_over=1,
        is_calibrated=True,
    )


def test_every_worker_of_a_process_is_told_apart() -> None:
    """A fleet of emulated ones has many; free slots never fall below zero."""
    source = WorkerMetrics(lambda: [figures("a"), figures("b")], lambda: {"events_dropped": 5})

    found = {(s.name, *s.labels.values()): s.value for family in source.collect() for s in family.samples}

    for worker in ("a", "b"):
        assert found["l4queue_worker_free_requests", worker] == 1
        assert found["l4queue_worker_stage", worker] == 1
        assert found["l4queue_engine_kv_usage_ratio", worker] == 0.25
        assert found["l4queue_engine_step_seconds_count", worker, "decode"] == 3
        assert found["l4queue_engine_tokens_total", worker, "prefill"] == 100
        assert found["l4queue_cost_model_error_ratio_count", worker] == 3
        assert found["l4queue_cost_model_calibrated", worker] == 1
    assert found["l4queue_worker_engines",] == 2
    assert found["l4queue_worker_events_dropped_total",] == 5


def test_an_engine_that_loads_has_no_figures_yet() -> None:
    """The process can be scraped all the same."""
    found = {f.name: f.samples for f in WorkerMetrics(list, dict).collect()}

    assert found["l4queue_worker_engines"][0].value == 0
    assert found["l4queue_worker_running_requests"] == []

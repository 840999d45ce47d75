"""Demand against capacity: the scarcer of KV cache and slots; what a fleet of none would need."""

from __future__ import annotations

import pytest

from l4queue.models import WorkerLoad
from l4queue.policy.autoscale import FleetDemand, demand_of


def load(name: str = "w", *, running: int = 2, context: int = 500, is_draining: bool = False) -> WorkerLoad:
    """A worker with ten slots and 1,000 tokens of KV cache."""
    return WorkerLoad(
        worker_id=name,
        num_running=running,
        context_tokens=context,
        kv_capacity_tokens=1000,
        max_running=10,
        is_draining=is_draining,
    )


def test_what_waits_and_what_runs_add_up() -> None:
    """Tokens with tokens, requests with requests."""
    demand = demand_of([load("a"), load("b")], queued_tokens=3000.0, queued_requests=4)

    assert (demand.tokens, demand.requests) == (4000.0, 8)
    assert (demand.capacity_tokens, demand.capacity_requests, demand.num_workers) == (2000, 20, 2)
    assert demand.ratio == pytest.approx(2.0)
    assert demand.workers() == pytest.approx(4.0)


def test_the_scarcer_of_cache_and_slots_counts() -> None:
    """Many short requests fill the slots long before the cache."""
    demand = demand_of([load(running=10, context=100)], queued_tokens=100.0, queued_requests=20)

    assert demand.ratio == pytest.approx(3.0)


def test_a_worker_that_leaves_adds_work_but_no_capacity() -> None:
    """Else a fleet that shrinks would look idle."""
    demand = demand_of([load("a"), load("b", is_draining=True)], queued_tokens=0.0, queued_requests=0)

    assert (demand.tokens, demand.capacity_tokens, demand.num_workers) == (1000.0, 1000, 1)


@pytest.mark.parametrize(("queued", "wanted"), [(0, 0.0), (7, 1.0)])
def test_without_any_worker_known_one_is_wanted_for_any_work(queued: int, wanted: float) -> None:
    """From nothing up to one, which then says what it can hold."""
    demand = demand_of([], queued_tokens=100.0 * queued, queued_requests=queued)

    assert demand.ratio is None
    assert demand.workers() == wanted
    assert demand.workers(last_known=FleetDemand(
        tokens=0, requests=0, capacity_tokens=0, capacity_requests=0, num_workers=0
    )) == wanted  # fmt: skip


def test_without_workers_work_is_measured_by_the_last_ones() -> None:
    """After a scale to zero."""
    before = demand_of([load("a"), load("b")], queued_tokens=0.0, queued_requests=0)

    demand = demand_of([], queued_tokens=5000.0, queued_requests=1)

    assert demand.workers(last_known=before) == pytest.approx(5.0)

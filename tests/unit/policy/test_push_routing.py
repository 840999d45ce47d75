"""Routers without late binding: in turn, least loaded, two pools."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.models import Plan, Routing, StagePlan
from l4queue.policy.push_routing import Outstanding, push

SOME = st.builds(
    Outstanding,
    worker_id=st.sampled_from("abcdef"),
    num_requests=st.integers(0, 4),
    tokens=st.integers(0, 9),
)
WORKERS = st.lists(SOME, unique_by=lambda w: w.worker_id, max_size=6)


def _plan(routing: Routing, *, short: tuple[str, ...] = ("a", "b"), long: tuple[str, ...] = ("c",)) -> Plan:
    stages = (
        StagePlan(low_tokens=0, high_tokens=100, num_workers=len(short), worker_ids=short),
        StagePlan(low_tokens=100, high_tokens=None, num_workers=len(long), worker_ids=long),
    )
    return Plan(version=1, stages=stages, routing=routing)


@given(workers=WORKERS, start=st.integers(0, 100))
def test_round_robin_gives_each_worker_one_of_any_n_in_a_row(workers: list[Outstanding], start: int) -> None:
    """Whatever they have to do."""
    n = len(workers)
    plan = _plan(Routing.ROUND_ROBIN)
    chosen = [push(5, plan, workers, turn=turn).worker_id for turn in range(start, start + n)]
    assert sorted(map(str, chosen)) == sorted(w.worker_id for w in workers)


@given(workers=WORKERS, tokens=st.integers(0, 300))
def test_least_loaded_never_pushes_past_a_worker_with_less(workers: list[Outstanding], tokens: int) -> None:
    """By requests, then tokens, then name."""
    chosen = push(tokens, _plan(Routing.LEAST_LOADED), workers, turn=7)
    expected = sorted((w.num_requests, w.tokens, w.worker_id) for w in workers)
    assert chosen.worker_id == (expected[0][2] if expected else None)


@given(workers=WORKERS, tokens=st.integers(0, 300))
def test_two_pools_keep_to_their_pool_while_it_has_workers(workers: list[Outstanding], tokens: int) -> None:
    """The least loaded of the pool; of all where the pool is empty."""
    plan = _plan(Routing.TWO_POOL)
    pool = [w for w in workers if w.worker_id in (("a", "b") if tokens < 100 else ("c",))]
    chosen = push(tokens, plan, workers, turn=0)
    assert chosen == push(tokens, _plan(Routing.LEAST_LOADED), pool or workers, turn=0)

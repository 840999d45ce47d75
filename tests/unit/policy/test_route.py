"""Routing: every length has exactly one stage."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.models import Plan, StagePlan
from l4queue.policy.loads import StageLoad
from l4queue.policy.route import route


def _plan(edges: list[int], workers: list[int]) -> Plan:
    ends: list[int | None] = [*edges[1:], None]
    stages = zip(edges, ends, workers, strict=True)
    return Plan(
        version=1,
        stages=tuple(StagePlan(low_tokens=a, high_tokens=b, num_workers=n) for a, b, n in stages),
    )


PLANS = st.sets(st.integers(1, 10**6), max_size=4).flatmap(
    lambda inner: st.lists(st.integers(0, 3), min_size=len(inner) + 1, max_size=len(inner) + 1).map(
        lambda workers: _plan([0, *sorted(inner)], workers)
    )
)


@given(st.integers(0, 2 * 10**6), PLANS)
def test_routing_is_total_and_exact(length: int, plan: Plan) -> None:
    """A staffed stage that holds the length is chosen; a boundary belongs to the upper stage."""
    chosen = route(length, plan)

    own = [
        i
        for i, s in enumerate(plan.stages)
        if s.low_tokens <= length and (s.high_tokens is None or length < s.high_tokens)
    ]
    assert len(own) == 1
    staffed = [i for i, s in enumerate(plan.stages) if s.num_workers]
    if own[0] in staffed or not staffed or len(plan.stages) == 1:
        assert chosen.stage == own[0]
    else:
        above = [i for i in staffed if i > own[0]]
        assert chosen.stage == (min(above) if above else max(staffed))
    assert chosen.stage not in chosen.alternatives
    assert set(chosen.alternatives) <= set(staffed)


def test_a_boundary_belongs_to_the_upper_stage_and_the_end_is_open() -> None:
    """512 goes up, 511 stays, a million goes to the last, a negative length counts as zero."""
    plan = _plan([0, 512], [1, 1])

    assert [route(n, plan).stage for n in (-5, 0, 511, 512, 10**6)] == [0, 0, 0, 1, 1]


def test_alternatives_come_by_drain_time_when_loads_are_known() -> None:
    """The stage that is done first is the first alternative; a stage whose workers left is passed over."""
    plan = _plan([0, 512, 4096], [1, 1, 1])
    loads = [
        StageLoad(stage=0, num_workers=1, drain_ms=50.0),
        StageLoad(stage=1, num_workers=0),
        StageLoad(stage=2, num_workers=2, drain_ms=10.0),
    ]

    assert route(100, plan, loads=loads).alternatives == (2,)
    moved = route(600, plan, loads=loads)
    assert (moved.stage, moved.alternatives, moved.reason) == (2, (0,), "stage 1 has no workers")
    assert route(600, plan).alternatives == (2, 0)

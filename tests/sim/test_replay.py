"""Replays of recent traffic: what they say of a plan, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest

from l4queue.cli.bench.traffic import bench_trace
from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import Plan, StagePlan
from l4queue.planning.histogram import Buckets, Demand
from l4queue.sim import replay
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.records import Changed, RecordedArrival
from l4queue.sim.replay import make_replay
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace
from l4queue.sim.traces.workload import make_workload

COST = load_coefficients("h100", "llama-3.1-8b")


def traffic(*, num_requests: int, rate_rps: float, seed: int = 1) -> Trace:
    """Mixed requests at a rate."""
    trace = make_workload("mixed", num_requests=num_requests, rng=np.random.default_rng(seed))
    return trace.scaled(rate_rps / trace.rate_rps)


def recorded(trace: Trace) -> list[RecordedArrival]:
    """The trace as a record of what has finished."""
    return [
        RecordedArrival(arrival_s=float(a), input_tokens=int(i), output_tokens=int(o))
        for a, i, o in zip(trace.arrival_s, trace.input_tokens, trace.output_tokens, strict=True)
    ]


def two_stages(boundary_tokens: int, num_short: int, num_long: int) -> Plan:
    """A plan as the planner proposes it."""
    return Plan(
        version=1,
        stages=(
            StagePlan(low_tokens=0, high_tokens=boundary_tokens, num_workers=num_short),
            StagePlan(low_tokens=boundary_tokens, high_tokens=None, num_workers=num_long),
        ),
    )


def test_a_replay_refuses_a_plan_that_starves_the_long() -> None:
    """Fifteen of sixteen workers for the short: the bound on the longest 5 % makes it infinitely bad."""
    trace = traffic(num_requests=500, rate_rps=60.0)
    recent = recorded(trace)
    replays = make_replay(recent, cost=COST, num_instances=16)
    assert replays is not None
    stages = (
        StagePlan(low_tokens=0, high_tokens=4096, num_workers=15),
        StagePlan(low_tokens=4096, high_tokens=None, num_workers=1),
    )

    one = replays.score(Plan.one_stage(num_workers=16))

    assert 0.0 < one < float("inf")
    assert replays.score(Plan(version=1, stages=stages)) > one


@pytest.mark.parametrize("objective", ["balanced", "mean"])
def test_a_replay_that_is_broken_off_was_much_worse_and_says_so(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored after others, a plan that starves many is stopped early; its true score is far above the best too."""
    trace = traffic(num_requests=1500, rate_rps=60.0)
    recent = recorded(trace)
    plans = [two_stages(4096, 7, 9), two_stages(512, 1, 15), two_stages(4096, 15, 1), two_stages(2048, 6, 10)]
    options = L4Options(objective=objective, without=frozenset({"stealing", "running-steals", "escape"}))

    def make():  # type: ignore[no-untyped-def]
        made = make_replay(recent, cost=COST, num_instances=16, options=options)
        assert made is not None
        return made.score

    together = make()
    found = [together(plan) for plan in plans]
    monkeypatch.setattr(replay, "_CLEARLY_WORSE", float("inf"))
    whole = make()
    true = [whole(plan) for plan in plans]

    best = min(true)
    assert found.index(min(found)) == true.index(best)
    assert max(true) > 2.0 * best
    for seen, value in zip(found, true, strict=True):
        assert seen == value or (seen > 1.25 * best and value > 1.1 * best)
    assert found != true


@pytest.mark.parametrize("objective", ["mean", "normalized", "goodput"])
def test_a_replay_scores_by_the_objective(objective: str) -> None:
    """Held against the latencies of such a run: mean, per output token, or the share beyond the service level."""
    trace = traffic(num_requests=600, rate_rps=60.0)
    recent = recorded(trace)
    options = L4Options(objective=objective, slo_ttft_ms=400.0, slo_tpot_ms=15.0)
    replays = make_replay(recent, cost=COST, num_instances=16, options=options)
    assert replays is not None
    setting = RunConfig(cost=COST, num_instances=16, price=MovePrice())
    for plan in (Plan.one_stage(num_workers=16), two_stages(4096, 7, 9), two_stages(2048, 6, 10)):
        measured = run_policy(L4(options, fixed=plan), trace, setting).measured
        told = {
            "mean": measured.e2e_s.mean(),
            "normalized": (measured.e2e_s / measured.output_tokens).mean(),
            "goodput": np.mean(
                [t > 0.4 or p > 0.015 for t, p in zip(measured.ttft_s, measured.tpot_s, strict=True)]
            ),
        }
        assert replays.score(plan) == pytest.approx(told[objective])
        assert objective != "goodput" or 0.0 < replays.score(plan) < 1.0


def test_after_a_change_a_replay_is_of_what_came_since() -> None:
    """Short prompts, then long ones: few of these are known, so as many are drawn as a replay needs."""
    buckets = Buckets.log_spaced(131_072)
    rng = np.random.default_rng(0)
    before = [
        RecordedArrival(arrival_s=0.1 * i, input_tokens=100, output_tokens=20, e2e_s=0.5) for i in range(400)
    ]
    since = [
        RecordedArrival(arrival_s=40.0 + i, input_tokens=20_000, output_tokens=20, e2e_s=2.0) for i in range(20)
    ]
    demand = Demand.of_requests(buckets, rng.integers(19_000, 22_000, 40), np.full(40, 20), duration_s=20.0)
    changed = Changed(begun_s=40.0, mix_begun_s=40.0, demand=demand, buckets=buckets)
    one = Plan.one_stage(num_workers=2)

    known = make_replay([*before, *since], cost=COST, num_instances=2)
    drawn = make_replay([*before, *since], cost=COST, num_instances=2, changed=changed)
    again = make_replay([*before, *since], cost=COST, num_instances=2, changed=changed)

    assert known is not None
    assert drawn is not None
    assert again is not None
    assert drawn.score(one) > 3.0 * known.score(one)
    assert drawn.score(one) == again.score(one)
    assert make_replay(before[:50], cost=COST, num_instances=2, changed=changed) is None


def test_few_arrivals_give_no_score() -> None:
    """What a handful of requests would have seen says nothing."""
    few = [RecordedArrival(arrival_s=float(i), input_tokens=10, output_tokens=10) for i in range(20)]

    assert make_replay(few, cost=COST, num_instances=4) is None


CPU = StepCost(alpha_ms=4.2, beta_ms=0.33, gamma_ms=6e-4, pi_ms=0.085, psi_ms=4.8e-5, kv_capacity_tokens=262_144)
LINK = MovePrice(bandwidth_bytes_per_s=750e6, kv_bytes_per_token=4096, fixed_ms=50.0)
CLASSES, ONE = two_stages(304, 1, 1), Plan.one_stage(num_workers=2)


def short_and_long() -> list[RecordedArrival]:
    """Minutes for two slow engines: one prompt in ten is long, and short ones wait behind it if they can."""
    return recorded(bench_trace(None, "mixed", rate=9.0, duration_s=160.0, seed=3))


def test_a_gain_of_many_requests_is_sure_and_of_few_is_not() -> None:
    """Classes save two fifths: sure by minutes, not by their last seconds."""
    record = short_and_long()
    many, few = (make_replay(part, cost=CPU, num_instances=2, price=LINK) for part in (record, record[-150:]))
    assert many is not None
    assert few is not None

    gain = 1.0 - many.score(CLASSES) / many.score(ONE)

    assert 0.0 < many.sure_gain(CLASSES, ONE) < gain
    assert many.sure_gain(CLASSES, ONE) == many.sure_gain(CLASSES, ONE)
    assert many.sure_gain(ONE, CLASSES) < 0.0
    assert many.sure_gain(ONE, ONE) == 0.0
    assert few.sure_gain(CLASSES, ONE) < 0.0


def test_a_record_drawn_from_few_requests_proves_no_more_than_these() -> None:
    """As many are replayed, drawn from all that came since the mix changed: the fewer, the less is sure."""
    record, buckets, sure = short_and_long(), Buckets.log_spaced(131_072), []
    for num_alike in (1300, 300, 110):
        alike = record[-num_alike:]
        lengths = [a.input_tokens for a in alike], [a.output_tokens for a in alike]
        demand = Demand.of_requests(buckets, *lengths, duration_s=num_alike / 9.0)
        mix_begun_s, begun_s = alike[0].arrival_s, record[-50].arrival_s
        changed = Changed(begun_s=begun_s, mix_begun_s=mix_begun_s, demand=demand, buckets=buckets)
        replays = make_replay(record, cost=CPU, num_instances=2, price=LINK, changed=changed)
        assert replays is not None
        assert replays.score(CLASSES) < replays.score(ONE)
        sure.append(replays.sure_gain(CLASSES, ONE))

    assert sure[0] > 0.0
    assert sure[0] > sure[1] >= sure[2]
    assert sure[2] < 0.0

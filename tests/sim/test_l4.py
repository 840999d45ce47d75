"""L4 in the simulator: nothing lost with every ingredient on or off, gains where classes pay, none where not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dispatcher.routing.router import Router
from l4queue.cli.bench.traffic import bench_trace
from l4queue.config import Settings
from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.move import MovePrice
from l4queue.errors import ConfigError
from l4queue.models import Plan, StagePlan
from l4queue.planning.histogram import Buckets, Demand
from l4queue.sim import replay
from l4queue.sim.cluster import Cluster
from l4queue.sim.policies.l4 import INGREDIENTS, L4, L4Options
from l4queue.sim.prove import prove_recent
from l4queue.sim.registry import make_policy
from l4queue.sim.replay import Changed, RecordedArrival, make_scorer
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace
from l4queue.sim.traces.workload import make_workload

COST = load_coefficients("h100", "llama-3.1-8b")


def traffic(name: str, *, num_requests: int, rate_rps: float, seed: int = 1) -> Trace:
    """A synthetic workload at a rate."""
    trace = make_workload(name, num_requests=num_requests, rng=np.random.default_rng(seed))
    return trace.scaled(rate_rps / trace.rate_rps)


@pytest.mark.parametrize(
    "without",
    [
        (),
        *((name,) for name in INGREDIENTS),
        ("running-steals", "stealing"),
        ("hand-over", "escape"),
    ],
)
@pytest.mark.parametrize("bandwidth", [None, 50e9])
def test_every_request_ends_whole_whatever_is_switched_off(
    without: tuple[str, ...], bandwidth: float | None
) -> None:
    """After each event: arrived = finished + in engines + in queues + in transit; outputs are complete."""
    trace = traffic("mixed", num_requests=400, rate_rps=30.0)
    requests = trace.requests()

    def conserved(cluster: Cluster) -> None:
        inside = sum(instance.num_requests for instance in cluster.instances)
        held = inside + cluster.policy.num_queued + cluster.num_in_transit
        assert cluster.num_arrived == cluster.num_finished + held

    cluster = Cluster(
        requests,
        cost=COST,
        num_instances=6,
        policy=L4(L4Options(without=frozenset(without), replan_s=1.0, min_life_s=1.0)),
        rng=np.random.default_rng(0),
        price=MovePrice(bandwidth_bytes_per_s=bandwidth),
        observe=conserved,
    )
    cluster.run()

    assert all(request.generated == request.output_tokens for request in requests)
    assert all(r.arrival_s <= r.first_token_s <= r.finish_s for r in requests)  # type: ignore[operator]
    if {"hand-over", "escape"} <= set(without):
        assert cluster.num_handovers == 0
    if {"stealing", "running-steals"} <= set(without):
        assert cluster.num_steals == 0
    elif "stealing" in without:
        assert sum(request.num_steals for request in requests) == cluster.num_steals


def test_classes_pay_on_a_long_tailed_mix() -> None:
    """Nine in ten short, one in ten long, busy engines: l4 beats shortest prompt first in one queue."""
    trace = traffic("mixed", num_requests=5000, rate_rps=80.0, seed=2)
    setting = RunConfig(cost=COST, num_instances=16)

    blind = run_policy(make_policy("central-sjf", trace=trace, setting=setting), trace, setting).result
    found = run_policy(make_policy("l4", trace=trace, setting=setting), trace, setting).result

    assert found.mean_e2e_s < 0.95 * blind.mean_e2e_s


def test_one_instance_is_served_like_one_queue() -> None:
    """With nothing to divide, l4 is shortest prompt first."""
    trace = traffic("chat", num_requests=300, rate_rps=3.0)
    setting = RunConfig(cost=COST, num_instances=1)

    blind = run_policy(make_policy("central-sjf", trace=trace, setting=setting), trace, setting).result
    found = run_policy(make_policy("l4", trace=trace, setting=setting), trace, setting).result

    assert found.mean_e2e_s == pytest.approx(blind.mean_e2e_s, rel=1e-9)


def test_the_same_seed_gives_the_same_figures() -> None:
    """Decisions are functions; nothing depends on the order of sets or on a clock."""
    trace = traffic("mixed", num_requests=500, rate_rps=40.0)
    setting = RunConfig(cost=COST, num_instances=8)

    first = run_policy(make_policy("l4", trace=trace, setting=setting), trace, setting).result
    again = run_policy(make_policy("l4", trace=trace, setting=setting), trace, setting).result

    assert first == again


def test_an_idle_engine_takes_running_requests_of_an_overloaded_one() -> None:
    """Thirty long decodes on one of two engines, nothing waits: the other asks, the mean falls by a tenth."""
    stages = (
        StagePlan(low_tokens=0, high_tokens=4096, num_workers=1),
        StagePlan(low_tokens=4096, high_tokens=None, num_workers=1),
    )
    trace = Trace(
        name="all long",
        arrival_s=np.zeros(30),
        input_tokens=np.full(30, 8000),
        output_tokens=np.full(30, 1000),
    )
    setting = RunConfig(cost=COST, num_instances=2, price=MovePrice(bandwidth_bytes_per_s=50e9))
    found = []
    for without in (frozenset[str](), frozenset({"running-steals"})):
        policy = L4(L4Options(without=without | {"stealing", "escape"}), fixed=Plan(version=1, stages=stages))
        found.append(run_policy(policy, trace, setting).result)

    assert found[0].num_steals > 0 == found[1].num_steals
    assert found[0].mean_e2e_s < 0.9 * found[1].mean_e2e_s


def test_what_runs_leaves_before_a_long_prefill() -> None:
    """Ten requests decode on each of two engines when a prompt of 40,000 tokens comes: all there leave."""
    trace = Trace(
        name="one long",
        arrival_s=np.array([0.0] * 20 + [1.0]),
        input_tokens=np.array([200] * 20 + [40_000]),
        output_tokens=np.array([400] * 20 + [10]),
    )
    setting = RunConfig(cost=COST, num_instances=2, price=MovePrice(bandwidth_bytes_per_s=50e9))
    found = []
    for without in (frozenset[str](), frozenset({"escape"})):
        policy = L4(L4Options(without=without), fixed=Plan.one_stage())
        found.append(run_policy(policy, trace, setting))

    prefill_s = COST.prefill_ms(40_000) / 1000
    latest = [float(run.measured.e2e_s[:20].max()) for run in found]
    assert [run.result.num_handovers for run in found] == [10, 0]
    assert latest[1] - latest[0] > 0.5 * prefill_s


@pytest.mark.parametrize(("room_tokens", "least", "most"), [(None, 10, 10), (500, 1, 9), (10, 0, 0)])
def test_no_more_leave_than_have_room_for_their_kv_caches(room_tokens: int | None, least: int, most: int) -> None:
    """Ten want to leave before a long prompt, each with 200 tokens and more: never more on their way than fit."""
    trace = Trace(
        name="one long",
        arrival_s=np.array([0.0] * 20 + [1.0]),
        input_tokens=np.array([200] * 20 + [40_000]),
        output_tokens=np.array([400] * 20 + [10]),
    )
    price = MovePrice(bandwidth_bytes_per_s=50e9)
    if room_tokens is not None:
        price = replace(price, room_bytes=room_tokens * price.kv_bytes_per_token)

    def there_is_room(cluster: Cluster) -> None:
        assert cluster.price.room_bytes is None or cluster.price.room_bytes >= 0

    setting = RunConfig(cost=COST, num_instances=2, price=price)
    run = run_policy(L4(L4Options(), fixed=Plan.one_stage()), trace, setting, observe=there_is_room)

    assert least <= run.result.num_handovers <= most


def test_the_planner_may_ignore_a_skew_that_the_engine_has() -> None:
    """Without `skew-in-planner` the plan is made for σ = 0; the engine's steps keep the term."""
    policy = make_policy(
        "l4",
        trace=traffic("mixed", num_requests=10, rate_rps=1.0),
        setting=RunConfig(cost=COST, num_instances=2),
        options=L4Options(without=frozenset({"skew-in-planner"})),
    )
    cluster = Cluster([], cost=COST, num_instances=2, policy=policy, rng=np.random.default_rng(0))

    policy.attach(cluster)

    assert isinstance(policy, L4)
    assert COST.sigma_ms > 0.0
    assert policy.snapshot(0.0).cost.sigma_ms == 0.0
    assert cluster.instances[0].cost.sigma_ms == COST.sigma_ms


def test_a_replay_refuses_a_plan_that_starves_the_long() -> None:
    """Fifteen of sixteen workers for the short: the bound on the longest 5 % makes it infinitely bad."""
    trace = traffic("mixed", num_requests=500, rate_rps=60.0)
    recent = [
        RecordedArrival(arrival_s=float(a), input_tokens=int(i), output_tokens=int(o))
        for a, i, o in zip(trace.arrival_s, trace.input_tokens, trace.output_tokens, strict=True)
    ]
    score = make_scorer(recent, cost=COST, num_instances=16)
    assert score is not None
    stages = (
        StagePlan(low_tokens=0, high_tokens=4096, num_workers=15),
        StagePlan(low_tokens=4096, high_tokens=None, num_workers=1),
    )

    one = score(Plan.one_stage(num_workers=16))

    assert 0.0 < one < float("inf")
    assert score(Plan(version=1, stages=stages)) > one


def two_stages(boundary_tokens: int, num_short: int, num_long: int) -> Plan:
    """A plan as the planner proposes it."""
    return Plan(
        version=1,
        stages=(
            StagePlan(low_tokens=0, high_tokens=boundary_tokens, num_workers=num_short),
            StagePlan(low_tokens=boundary_tokens, high_tokens=None, num_workers=num_long),
        ),
    )


@pytest.mark.parametrize("objective", ["balanced", "mean"])
def test_a_replay_that_is_broken_off_was_much_worse_and_says_so(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored after others, a plan that starves many is stopped early; its true score is far above the best too."""
    trace = traffic("mixed", num_requests=1500, rate_rps=60.0)
    recent = [
        RecordedArrival(arrival_s=float(a), input_tokens=int(i), output_tokens=int(o))
        for a, i, o in zip(trace.arrival_s, trace.input_tokens, trace.output_tokens, strict=True)
    ]
    plans = [two_stages(4096, 7, 9), two_stages(512, 1, 15), two_stages(4096, 15, 1), two_stages(2048, 6, 10)]
    options = L4Options(objective=objective, without=frozenset({"stealing", "running-steals", "escape"}))

    def make():  # type: ignore[no-untyped-def]
        score = make_scorer(recent, cost=COST, num_instances=16, options=options)
        assert score is not None
        return score

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
    trace = traffic("mixed", num_requests=600, rate_rps=60.0)
    recent = [
        RecordedArrival(arrival_s=float(a), input_tokens=int(i), output_tokens=int(o))
        for a, i, o in zip(trace.arrival_s, trace.input_tokens, trace.output_tokens, strict=True)
    ]
    options = L4Options(objective=objective, slo_ttft_ms=400.0, slo_tpot_ms=15.0)
    score = make_scorer(recent, cost=COST, num_instances=16, options=options)
    assert score is not None
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
        assert score(plan) == pytest.approx(told[objective])
        assert objective != "goodput" or 0.0 < score(plan) < 1.0


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
    changed = Changed(begun_s=40.0, demand=demand, buckets=buckets)
    one = Plan.one_stage(num_workers=2)

    known = make_scorer([*before, *since], cost=COST, num_instances=2)
    drawn = make_scorer([*before, *since], cost=COST, num_instances=2, changed=changed)
    again = make_scorer([*before, *since], cost=COST, num_instances=2, changed=changed)

    assert known is not None
    assert drawn is not None
    assert again is not None
    assert drawn(one) > 3.0 * known(one)
    assert drawn(one) == again(one)
    assert make_scorer(before[:50], cost=COST, num_instances=2, changed=changed) is None


@pytest.mark.parametrize("seed", range(3))
def test_what_is_known_follows_a_turn_of_the_mix_within_two_rounds(seed: int) -> None:
    """3, 25 and 3 % long prompts: two periods after each turn the planner's demand is that of the new mix."""
    known: dict[float, float] = {}

    class Watched(L4):
        def _replan(self, now_s: float) -> None:
            super()._replan(now_s)
            counts = self.traffic.counts
            long = counts.arrivals[self.traffic.buckets.index(1024) :].sum()
            known[round(now_s)] = float(long / counts.arrivals.sum())

    trace = bench_trace(None, "flip", rate=20.0, duration_s=300.0, seed=seed)
    setting = RunConfig(cost=COST, num_instances=4)

    run_policy(Watched(L4Options(), prove=prove_recent), trace, setting)

    assert max(share for at_s, share in known.items() if 20 <= at_s <= 100) < 0.08
    assert min(share for at_s, share in known.items() if 121 <= at_s <= 200) > 0.12
    assert max(share for at_s, share in known.items() if 221 <= at_s <= 300) < 0.08


def test_few_arrivals_give_no_score() -> None:
    """What a handful of requests would have seen says nothing."""
    few = [RecordedArrival(arrival_s=float(i), input_tokens=10, output_tokens=10) for i in range(20)]

    assert make_scorer(few, cost=COST, num_instances=4) is None


@pytest.mark.parametrize(
    ("objective", "without"), [("fastest", frozenset()), ("mean", frozenset({"late binding"}))]
)
def test_unknown_options_are_refused_by_name(objective: str, without: frozenset[str]) -> None:
    """The message lists what is known."""
    with pytest.raises(ConfigError, match="choose from"):
        L4Options.checked(objective=objective, without=without)


@pytest.mark.parametrize("given", [None, 700.0])
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_a_queue_is_in_the_order_that_a_dispatcher_gives_it(gpu: str, given: float | None) -> None:
    """By the cost model that its workers measured, or by the number in its settings."""
    cost = load_coefficients(gpu, "llama-3.1-8b")
    policy = L4(L4Options(ageing_tokens_per_s=given))
    requests = traffic("mixed", num_requests=20, rate_rps=30.0).requests()
    Cluster(requests, cost=cost, num_instances=2, policy=policy, rng=np.random.default_rng(0)).run()
    router = Router(Settings(ageing_tokens_per_s=given))
    router.measured(cost)

    for request in requests:
        place = router.place(request.prompt_tokens, submitted_ms=round(request.arrival_s * 1000), priority=0)
        assert policy.score_of(request) == pytest.approx(place.score, abs=1.0)

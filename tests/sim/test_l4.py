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
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.l4 import INGREDIENTS, L4, L4Options
from l4queue.sim.prove import prove_recent
from l4queue.sim.registry import make_policy
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


@pytest.mark.parametrize(("without", "is_in_turn"), [((), False), (("order",), True)])
def test_without_order_a_queue_is_served_in_turn(without: tuple[str, ...], is_in_turn: bool) -> None:
    policy = L4(L4Options(without=frozenset(without)))
    requests = [
        SimRequest(0, 0.0, prompt_tokens=30_000, output_tokens=2),
        SimRequest(1, 0.001, prompt_tokens=10, output_tokens=2),
    ]
    Cluster(requests, cost=COST, num_instances=2, policy=policy, rng=np.random.default_rng(0)).run()

    assert (policy.score_of(requests[0]) < policy.score_of(requests[1])) == is_in_turn

"""The event loop and the length-blind policies: ties, conservation, closed forms, capacity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.errors import ConfigError
from l4queue.sim.capacity import Bound, capacity_rps, find_instances, parse_slo
from l4queue.sim.cluster import Cluster, EventKind
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.affinity import CacheAware, DynamoKv, LlmD, SessionSticky
from l4queue.sim.policies.central import Central, CentralSjf, Clairvoyant, TwoPool
from l4queue.sim.policies.length_blind import LeastRequests, LeastTokens, Llumnix, PowerOfTwo, Random, RoundRobin
from l4queue.sim.policies.split import LoadSplit, PrefillSplit
from l4queue.sim.policy import Policy
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace
from l4queue.sim.traces.workload import make_workload
from l4queue.sim.tuning import tune_two_pool

COST = StepCost(
    alpha_ms=6.0,
    beta_ms=0.05,
    gamma_ms=0.0005,
    pi_ms=0.03,
    psi_ms=1e-6,
    kv_capacity_tokens=60_000,
    max_batched_tokens=2048,
    max_num_seqs=32,
)


def check_conservation(cluster: Cluster) -> None:
    """Every arrived request is in exactly one place."""
    in_engines = sum(i.num_requests for i in cluster.instances)
    held = cluster.policy.num_queued + cluster.num_in_transit
    assert cluster.num_arrived == cluster.num_finished + in_engines + held


POLICIES: list[Callable[[], Policy]] = [
    RoundRobin,
    Random,
    LeastRequests,
    LeastTokens,
    PowerOfTwo,
    Llumnix,
    SessionSticky,
    CacheAware,
    LlmD,
    DynamoKv,
    Central,
    CentralSjf,
    Clairvoyant,
    lambda: TwoPool(threshold_tokens=1000, num_short=2),
    lambda: PrefillSplit(num_prefill=2),
    LoadSplit,
]


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("bandwidth", [None, 5e9])
def test_nothing_is_lost_or_invented_and_runs_repeat(make: Callable[[], Policy], bandwidth: float | None) -> None:
    """Conservation after every event; every request ends with all its tokens; same seed, same figures."""
    trace = make_workload("mixed", num_requests=150, rng=np.random.default_rng(3), rate_rps=12.0)
    trace = trace.select(np.flatnonzero(trace.input_tokens + trace.output_tokens < 50_000))
    finishes = []
    for _ in range(2):
        requests = trace.requests()
        price = MovePrice(bandwidth_bytes_per_s=bandwidth)
        cluster = Cluster(
            requests,
            cost=COST,
            num_instances=4,
            policy=make(),
            rng=np.random.default_rng(5),
            price=price,
            observe=check_conservation,
        )
        cluster.run()
        assert all(r.generated == r.output_tokens for r in requests)
        assert all(r.finish_s is not None and r.finish_s > r.arrival_s for r in requests)
        finishes.append([r.finish_s for r in requests])
    assert finishes[0] == finishes[1]


def test_simultaneous_events_are_served_finish_landing_arrival_start_tick() -> None:
    """The order of kinds is the order of ties."""
    assert list(EventKind) == sorted(EventKind)
    assert [k.name for k in EventKind] == ["BOUNDARY", "LANDED", "ARRIVAL", "START", "TICK"]


class Recorder(RoundRobin):
    """Notes what it saw at each hook."""

    tick_s = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        self.seen.append(("arrival", self.cluster.num_finished))
        super().on_arrival(request, now_s)

    def on_tick(self, now_s: float) -> None:
        self.seen.append(("tick", self.cluster.num_arrived))


def test_a_finish_precedes_an_arrival_and_a_tick_follows_it_at_the_same_instant() -> None:
    """One prefill step of exactly one second; the next arrival and a tick fall on its end."""
    cost = StepCost(alpha_ms=0.0, beta_ms=0.0, gamma_ms=0.0, pi_ms=10.0, psi_ms=0.0)
    requests = [SimRequest(i, float(i), prompt_tokens=100, output_tokens=1) for i in range(2)]
    policy = Recorder()
    Cluster(requests, cost=cost, num_instances=1, policy=policy, rng=np.random.default_rng(0)).run()

    assert policy.seen[:3] == [("arrival", 0), ("arrival", 1), ("tick", 2)]


def test_arrivals_at_one_instant_share_a_step() -> None:
    """An idle engine starts after all arrivals of the instant."""
    requests = [SimRequest(i, 1.0, prompt_tokens=100, output_tokens=1) for i in range(3)]
    Cluster(requests, cost=COST, num_instances=1, policy=RoundRobin(), rng=np.random.default_rng(0)).run()

    assert len({r.first_token_s for r in requests}) == 1


def test_single_token_prompts_queue_as_m_d_1() -> None:
    """One output token and one request a step is a deterministic server: mean wait ρ·s/(2(1-ρ))."""
    service_s, rho = 0.1, 0.7
    cost = StepCost(
        alpha_ms=0.0, beta_ms=0.0, gamma_ms=0.0, pi_ms=1.0, psi_ms=0.0, max_batched_tokens=100, max_num_seqs=1
    )
    rng = np.random.default_rng(11)
    count = 60_000
    arrival = np.cumsum(rng.exponential(service_s / rho, count))
    ones = np.ones(count, dtype=np.int64)
    trace = Trace(name="md1", arrival_s=arrival, input_tokens=100 * ones, output_tokens=ones)

    run = run_policy(RoundRobin(), trace, RunConfig(cost=cost, num_instances=1))

    expected_s = service_s + rho * service_s / (2 * (1 - rho))
    assert run.result.mean_e2e_s == pytest.approx(expected_s, rel=0.03)


def test_decoding_shares_the_engine_as_a_processor() -> None:
    """With α and β alone, n requests are served at the rate n/(α+βn): the number in flight is negative
    binomial whatever the law of lengths, so mean latency is o·(α+β)/(1-ρ) with ρ = β·o·rate."""
    cost = StepCost(alpha_ms=2.0, beta_ms=1.0, gamma_ms=0.0, pi_ms=0.0, psi_ms=0.0, max_num_seqs=100_000)
    rng = np.random.default_rng(5)
    count, output, rho = 20_000, 200, 0.6
    rate_rps = rho * 1000.0 / output
    arrival = np.cumsum(rng.exponential(1.0 / rate_rps, count))
    ones = np.ones(count, dtype=np.int64)
    trace = Trace(name="ps", arrival_s=arrival, input_tokens=ones, output_tokens=output * ones)

    run = run_policy(RoundRobin(), trace, RunConfig(cost=cost, num_instances=1))

    assert run.result.mean_e2e_s == pytest.approx(output * 0.003 / (1 - rho), rel=0.05)


def test_capacity_of_prefill_only_traffic_is_the_inverse_of_its_work() -> None:
    """Prompts of one output token: an instance carries 1 / (π·p + α·p/budget) requests a second."""
    cost = StepCost(alpha_ms=2.0, beta_ms=0.0, gamma_ms=0.0, pi_ms=0.1, psi_ms=0.0, max_batched_tokens=1000)
    count = 2000
    ones = np.ones(count, dtype=np.int64)
    trace = Trace(name="p", arrival_s=np.arange(count) / 10.0, input_tokens=500 * ones, output_tokens=ones)

    assert capacity_rps(trace, cost, num_instances=8) == pytest.approx(8 * 1000.0 / (50.0 + 1.0), rel=0.02)


def test_two_pools_are_tuned_to_separate_a_bimodal_mix() -> None:
    """The tuned threshold lies between the two kinds of prompts and beats one pool."""
    rng = np.random.default_rng(2)
    count = 1200
    is_long = rng.random(count) < 0.1
    inputs = np.where(is_long, 20_000, 200).astype(np.int64)
    outputs = np.where(is_long, 50, 100).astype(np.int64)
    arrival = np.cumsum(rng.exponential(1 / 60.0, count))
    trace = Trace(name="two", arrival_s=arrival, input_tokens=inputs, output_tokens=outputs)
    setting = RunConfig(cost=COST, num_instances=8)

    tuned = tune_two_pool(trace, setting)

    assert 200 < tuned.threshold_tokens <= 20_000
    assert (
        run_policy(tuned, trace, setting).result.mean_e2e_s
        < run_policy(Central(), trace, setting).result.mean_e2e_s
    )


def test_fewest_instances_are_found_by_bisection_and_minimal() -> None:
    """The number found keeps the level and one less does not."""
    trace = make_workload("chat", num_requests=300, rng=np.random.default_rng(1), rate_rps=30.0)
    slo = parse_slo("p99_ttft_s<2, p99_tpot_s<0.05")

    def run(count: int):  # type: ignore[no-untyped-def]
        return run_policy(LeastRequests(), trace, RunConfig(cost=COST, num_instances=count)).result

    found = find_instances(run, slo)

    assert found is not None
    number, result = found
    assert number > 1
    assert result.p99_ttft_s < 2
    worse = run(number - 1)
    assert worse.p99_ttft_s >= 2 or (worse.p99_tpot_s or 0) >= 0.05
    assert find_instances(run, (Bound(key="mean_e2e_s", limit=1e-9),), most=8) is None


@pytest.mark.parametrize("text", ["p99_ttft_s", "nonsense<3", "p99_ttft_s<-1", "p99_ttft_s<1e", ""])
def test_a_broken_service_level_is_named(text: str) -> None:
    """ConfigError quotes the part that is wrong."""
    with pytest.raises(ConfigError, match="--slo"):
        parse_slo(text)

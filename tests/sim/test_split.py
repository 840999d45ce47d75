"""Prefill apart from decode: who runs where, and how many engines prefill."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.request import Chain, SimRequest
from l4queue.sim.policies.split import LoadSplit, PrefillSplit
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace
from l4queue.sim.tuning import tune_split

COST = StepCost(
    alpha_ms=5.0, beta_ms=0.1, gamma_ms=1e-4, pi_ms=0.02, psi_ms=1e-6, kv_capacity_tokens=200_000, max_num_seqs=64
)
LINK = MovePrice(bandwidth_bytes_per_s=50e9)


def made(index: int, at_s: float, *, prompt: int, output: int = 20, chain: Chain = ()) -> SimRequest:
    return SimRequest(index, at_s, prompt_tokens=prompt, output_tokens=output, chain=chain)


def pushed(requests: list[SimRequest], *, num_prefill: int, num_instances: int) -> dict[int, list[int]]:
    """Engines that each request was given to, in order."""
    cluster = Cluster(
        requests,
        cost=COST,
        num_instances=num_instances,
        policy=PrefillSplit(num_prefill=num_prefill),
        rng=np.random.default_rng(0),
        price=LINK,
    )
    found: dict[int, list[int]] = {}
    push = cluster.push

    def record(request: SimRequest, instance) -> None:  # type: ignore[no-untyped-def]
        found.setdefault(request.index, []).append(instance.index)
        push(request, instance)

    cluster.push = record  # type: ignore[method-assign]
    cluster.run()
    assert all(r.generated == r.output_tokens for r in requests)
    return found


def test_prompts_wait_where_prefill_ends_first_and_outputs_are_spread_over_the_rest() -> None:
    """The short prompt does not queue behind the long one; a single token is not sent anywhere."""
    requests = [
        made(0, 0.0, prompt=40_000),
        made(1, 0.001, prompt=1_000),
        made(2, 0.002, prompt=1_000),
        made(3, 0.003, prompt=1_000, output=1),
    ]

    found = pushed(requests, num_prefill=2, num_instances=4)

    assert [found[i][0] for i in range(4)] == [0, 1, 1, 1]
    assert sorted(found[i][1] for i in (1, 2)) == [2, 3]
    assert len(found[3]) == 1
    assert [r.num_handovers for r in requests] == [1, 1, 1, 0]


def test_a_prompt_goes_where_its_prefix_is_cached() -> None:
    shared, own = range(125), range(125, 150)  # 2,000 and 400 tokens
    requests = [
        made(0, 0.0, prompt=2_000, chain=(range(1_000, 1_125),)),
        made(1, 0.001, prompt=2_000, chain=(shared,)),
        made(2, 5.0, prompt=2_400, chain=(shared, own)),
    ]

    found = pushed(requests, num_prefill=2, num_instances=3)

    assert found[0][0] != found[1][0] == found[2][0]
    assert requests[2].cached_tokens == 2_000


@pytest.mark.parametrize("num_prefill", [0, 2])
def test_without_engines_on_one_side_nothing_moves(num_prefill: int) -> None:
    requests = [made(0, 0.0, prompt=500), made(1, 0.0, prompt=500)]
    assert pushed(requests, num_prefill=num_prefill, num_instances=2) == {0: [0], 1: [1]}


@pytest.mark.parametrize(("prompt", "output"), [(8_000, 60), (500, 400)])
def test_the_tuned_split_is_no_worse_than_its_neighbours(prompt: int, output: int) -> None:
    rng = np.random.default_rng(3)
    count = 400
    trace = Trace(
        name="even",
        arrival_s=np.cumsum(rng.exponential(1 / 25.0, count)),
        input_tokens=rng.integers(prompt // 2, prompt * 3 // 2, count),
        output_tokens=rng.integers(output // 2, output * 3 // 2, count),
    )
    setting = RunConfig(cost=COST, num_instances=8, price=LINK)

    def mean_s(num_prefill: int) -> float:
        return run_policy(PrefillSplit(num_prefill=num_prefill), trace, setting).result.mean_e2e_s

    tuned = tune_split(trace, setting).num_prefill

    assert 1 <= tuned <= 7
    assert mean_s(tuned) <= min(mean_s(n) for n in (tuned - 1, tuned + 1) if 1 <= n <= 7)


def test_one_engine_is_not_split() -> None:
    trace = Trace(
        name="one",
        arrival_s=np.zeros(1),
        input_tokens=np.array([10], dtype=np.int64),
        output_tokens=np.array([2], dtype=np.int64),
    )
    assert tune_split(trace, RunConfig(cost=COST, num_instances=1)).num_prefill == 0


def test_the_split_by_load_follows_the_share_of_prefill_one_engine_at_a_time() -> None:
    """Eight engines; long prompts, then long outputs, then neither."""
    rng = np.random.default_rng(5)
    rows = [(at_s, 12_000, 5) for at_s in np.arange(0.0, 300.0, 1.0)]
    rows += [(at_s, 50, 800) for at_s in np.arange(300.0, 900.0, 0.5)]
    requests = [
        made(i, float(at_s + rng.uniform(0, 0.1)), prompt=prompt, output=output)
        for i, (at_s, prompt, output) in enumerate(rows)
    ]
    policy, seen = LoadSplit(), []

    def watch(cluster: Cluster) -> None:
        seen.append((cluster.now_s, policy.num_prefilling))

    Cluster(
        requests,
        cost=COST,
        num_instances=8,
        policy=policy,
        rng=np.random.default_rng(0),
        price=LINK,
        observe=watch,
    ).run()

    assert all(r.generated == r.output_tokens for r in requests)
    assert seen[0][1] == 4
    assert {number for at_s, number in seen if 100 < at_s < 300} == {7}
    assert {number for at_s, number in seen if 850 < at_s < 900} == {1}
    assert all(abs(b[1] - a[1]) <= 1 for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("num_instances", [1, 2, 3])
def test_a_small_fleet_keeps_an_engine_for_each_part(num_instances: int) -> None:
    requests = [made(i, 0.5 * i, prompt=3_000, output=1 + 20 * (i % 2)) for i in range(100)]
    policy = LoadSplit()
    Cluster(
        requests,
        cost=COST,
        num_instances=num_instances,
        policy=policy,
        rng=np.random.default_rng(0),
        price=LINK,
    ).run()
    assert all(r.generated == r.output_tokens for r in requests)
    assert 1 <= policy.num_prefilling <= max(1, num_instances - 1)

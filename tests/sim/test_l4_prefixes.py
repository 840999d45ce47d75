"""L4 on prompts of known content: nothing is lost, hits are sought, and the older L4 is one switch away."""

from __future__ import annotations

import numpy as np
import pytest

from l4queue.cost.move import MovePrice
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.policies.l4_prefixes import PrefixL4
from l4queue.sim.registry import make_policy
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.sessions import make_sessions
from tests.sim.small_engine import GPU as COST

TRACE = make_sessions("agent", num_requests=300, seed=1, rate_rps=8.0)


def check_conservation(cluster: Cluster) -> None:
    """Every arrived request is in exactly one place."""
    in_engines = sum(i.num_requests for i in cluster.instances)
    held = cluster.policy.num_queued + cluster.num_in_transit
    assert cluster.num_arrived == cluster.num_finished + in_engines + held


@pytest.mark.parametrize("bandwidth", [None, 50e9])
@pytest.mark.parametrize("without", [(), ("late-binding",), ("escape", "running-steals")])
def test_nothing_is_lost_or_invented_and_runs_repeat(bandwidth: float | None, without: tuple[str, ...]) -> None:
    """Conservation after every event; every request ends with all its tokens; same seed, same figures."""
    finishes = []
    for _ in range(2):
        requests = TRACE.requests()
        cluster = Cluster(
            requests,
            cost=COST,
            num_instances=4,
            policy=PrefixL4(L4Options(without=frozenset(without))),
            rng=np.random.default_rng(5),
            price=MovePrice(bandwidth_bytes_per_s=bandwidth),
            observe=check_conservation,
        )
        cluster.run()
        assert all(r.generated == r.output_tokens for r in requests)
        assert not cluster.policy._prefixes._noted  # type: ignore[attr-defined]
        finishes.append([r.finish_s for r in requests])
    assert finishes[0] == finishes[1]


def test_it_finds_as_much_as_sessions_that_stay_in_as_short_a_time() -> None:
    """And far more, in half the time, than the L4 that knows nothing of prefixes."""
    setting = RunConfig(cost=COST, num_instances=4)
    found = {
        name: run_policy(make_policy(name, trace=TRACE, setting=setting), TRACE, setting).result
        for name in ("session-sticky", "l4")
    }
    options = L4Options(without=frozenset({"affinity"}))
    before = run_policy(make_policy("l4", trace=TRACE, setting=setting, options=options), TRACE, setting).result

    ours, sticky = found["l4"], found["session-sticky"]
    assert ours.cached_share is not None
    assert sticky.cached_share is not None
    assert before.cached_share is not None
    assert ours.cached_share > 0.9 * sticky.cached_share
    assert ours.cached_share > 1.5 * before.cached_share
    assert ours.mean_e2e_s < 1.05 * sticky.mean_e2e_s
    assert ours.mean_e2e_s < 0.6 * before.mean_e2e_s


def test_only_known_content_and_the_switch_choose_it() -> None:
    setting = RunConfig(cost=COST, num_instances=2)
    blind = L4Options(without=frozenset({"affinity"}))

    assert type(make_policy("l4", trace=TRACE, setting=setting)) is PrefixL4
    assert type(make_policy("l4", trace=TRACE, setting=setting, options=blind)) is L4
    assert type(make_policy("l4", trace=TRACE.without_content(), setting=setting)) is L4


def test_a_prompt_is_due_without_what_its_engine_holds_until_its_first_token() -> None:
    """The second request has all of the first one's 40 blocks before its own 320 tokens."""
    first = SimRequest(0, 0.0, prompt_tokens=640, output_tokens=4, chain=(range(40),))
    second = SimRequest(1, 10.0, prompt_tokens=960, output_tokens=4, chain=(range(40), range(100, 120)))
    policy = PrefixL4(L4Options())
    seen: list[tuple[list[int], float, int]] = []

    def watch(cluster: Cluster) -> None:
        prefixes = policy._prefixes
        if cluster.now_s >= 10.0:
            holder = next(i for i in cluster.instances if prefixes.held_tokens(first, i))
            load = prefixes.load_of(holder).pending_prefill_tokens
            seen.append((prefixes.due_tokens(holder), prefixes.due_ms(holder), load))

    cluster = Cluster(
        [first, second], cost=COST, num_instances=3, policy=policy, rng=np.random.default_rng(0), observe=watch
    )
    cluster.run()

    assert second.cached_tokens == 640
    assert seen[0] == ([320], COST.prefill_ms(960, 640), 320)
    assert seen[-1] == ([], 0, 0)
    assert policy._prefixes.hit_share == pytest.approx(0.4, rel=0.01)

"""Routers that look for cached prefixes: their decisions on states made by hand, and their state over requests."""

from __future__ import annotations

import numpy as np
import pytest

from l4queue.cost.step import StepCost
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.request import Chain, SimRequest
from l4queue.sim.policies.affinity import (
    CacheAware,
    DynamoKv,
    LlmD,
    SessionSticky,
    cache_aware_choice,
    dynamo_cost,
    llm_d_scores,
)
from l4queue.sim.policy import Policy

COST = StepCost(
    alpha_ms=5.0, beta_ms=0.1, gamma_ms=1e-4, pi_ms=0.02, psi_ms=1e-6, kv_capacity_tokens=16_000, max_num_seqs=64
)


@pytest.mark.parametrize(
    ("loads", "match_rate", "expected"),
    [
        ([(5, 9), (0, 0), (0, 4)], 0.31, 0),  # a long match: its holder, though others are idle
        ([(5, 9), (0, 7), (0, 4)], 0.30, 2),  # not more than the threshold: fewest requests, then fewest ever
        ([(5, 9), (3, 0), (3, 0)], 0.0, 1),  # equal in both: the first
        ([(64, 9), (0, 0), (1, 0)], 0.9, 0),  # 64 more than the least is still balanced
        ([(65, 9), (0, 7), (0, 4)], 0.9, 2),  # 65 more, and more than 1.5 times as many
        ([(230, 9), (160, 0), (161, 0)], 0.9, 0),  # 70 more, but less than 1.5 times as many
    ],
)
def test_a_cache_aware_router_follows_the_tree_while_loads_are_balanced(
    loads: list[tuple[int, int]], match_rate: float, expected: int
) -> None:
    assert cache_aware_choice(loads, match_rate=match_rate, holder=0) == expected


def test_llm_d_adds_up_weighted_scores() -> None:
    """Queue 2, free cache 2, prefix 3; the queue counts between the shortest and the longest."""
    assert llm_d_scores([0, 0], [0.0, 0.5], [0.0, 1.0]) == pytest.approx([2 + 2 + 0, 2 + 1 + 3])
    assert llm_d_scores([0, 4, 1], [0.5, 0.5, 0.5], [0.0, 1.0, 0.5]) == pytest.approx(
        [2 + 1 + 0, 0 + 1 + 3, 2 * 0.75 + 1 + 1.5]
    )


def test_the_cost_of_dynamo_is_prefill_due_and_blocks_that_decode() -> None:
    assert (
        dynamo_cost(160, cached_blocks=4, prefill_tokens=320, active_blocks=30, new_blocks=6) == 10 + 20 - 4 + 36
    )
    assert dynamo_cost(160, cached_blocks=10, prefill_tokens=0, active_blocks=0, new_blocks=10) == 10


def request(index: int, at_s: float, chain: Chain, *, prompt: int, session: int | None = None) -> SimRequest:
    """A request with an output of ten tokens."""
    return SimRequest(index, at_s, prompt_tokens=prompt, output_tokens=10, chain=chain, session=session)


def placed(policy: Policy, requests: list[SimRequest], *, num_instances: int = 3) -> list[int]:
    """Engine that each request was sent to."""
    cluster = Cluster(
        requests, cost=COST, num_instances=num_instances, policy=policy, rng=np.random.default_rng(0)
    )
    found: dict[int, int] = {}
    push = cluster.push

    def record(sent: SimRequest, instance) -> None:  # type: ignore[no-untyped-def]
        found[sent.index] = instance.index
        push(sent, instance)

    cluster.push = record  # type: ignore[method-assign]
    cluster.run()
    return [found[r.index] for r in requests]


def test_a_cache_aware_router_keeps_what_it_sent_where_it_first_sent_it() -> None:
    """A prompt of which 20 % is known elsewhere is new; its own beginning still belongs to the first engine."""
    first, other = (range(60),), (range(12), range(100, 148))
    requests = [
        request(0, 0.0, first, prompt=960),
        request(1, 0.001, other, prompt=960),
        request(2, 0.002, other, prompt=960),
        request(3, 0.003, (range(12), range(200, 220)), prompt=512),
    ]

    assert placed(CacheAware(), requests) == [0, 1, 1, 0]


def test_llm_d_looks_at_the_first_256_blocks_and_forgets_the_oldest_of_an_engine() -> None:
    """A holder is chosen while its cache holds the prompt, by the router's guess."""
    same = (range(300),)
    assert len(set(placed(LlmD(), [request(i, 20.0 * i, same, prompt=4_800) for i in range(4)]))) == 1

    policy = LlmD()
    others = [request(i, 20.0 * i, (range(1000 * i, 1000 * i + 250),), prompt=4_000) for i in range(1, 9)]
    placed(policy, others, num_instances=1)
    kept = policy._latest[0]
    assert len(kept) == 1_000
    assert min(kept) == 5_000


def test_dynamo_counts_uncached_prompts_until_their_first_token_and_blocks_until_the_end() -> None:
    policy = DynamoKv()
    chain = (range(40),)
    requests = [request(0, 0.0, chain, prompt=640), request(1, 30.0, chain, prompt=645)]

    first, second = placed(policy, requests)

    assert first == second  # 40 of its 41 blocks are cached there: a cost of 41.3 against 81.3
    assert policy._prefill_tokens == [0, 0, 0]
    assert [len(active) for active in policy._active] == [0, 0, 0]
    assert policy._partial == [0, 0, 0]


def test_a_session_stays_where_its_first_request_went() -> None:
    sessions = [7, 8, 7, 9, 8, None]
    requests = [request(i, 0.001 * i, (), prompt=2_000, session=name) for i, name in enumerate(sessions)]

    assert placed(SessionSticky(), requests) == [0, 1, 0, 2, 1, 2]

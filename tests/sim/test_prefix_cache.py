"""Engines with prefix caches: block by block as in vLLM's pool, beside moves, and traces without content."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.cost.move import MovePrice
from l4queue.cost.step import BLOCK_TOKENS
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import Chain, SimRequest
from l4queue.sim.links import Links
from l4queue.sim.policies.l4 import L4Options
from l4queue.sim.policies.length_blind import RoundRobin
from l4queue.sim.policy import Policy
from l4queue.sim.registry import POLICIES, make_policy
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.content import Chains
from l4queue.sim.traces.sessions import make_sessions
from l4queue.sim.traces.trace import Trace
from tests.sim.blockwise import BlockwiseEngine, Job
from tests.sim.small_engine import COST, TICK_S, run_alone


def some_requests(seed: int, *, count: int, spread: int) -> list[SimRequest]:
    """Conversations that grow, with a common beginning, at odd times; some repeat a prompt to the last token."""
    rng = np.random.default_rng(seed)
    common = list(range(10))
    texts = [[*common, *range(1000 * n, 1000 * n + 200)] for n in range(1, 4)]
    ticks = np.sort(rng.integers(0, spread, count)).tolist()
    lengths = [0, 16, 160, 161, *rng.integers(1, 700, 4).tolist()]
    made = []
    for index, tick in enumerate(ticks):
        prompt = max(1, int(rng.choice(lengths)))
        output = int(rng.integers(1, 120))
        text = texts[int(rng.integers(3))][: (prompt + output) // BLOCK_TOKENS]
        chain: Chain = tuple(range(block, block + 1) for block in text)
        made.append(SimRequest(index, tick * TICK_S, prompt_tokens=prompt, output_tokens=output, chain=chain))
    return made


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 14),
    spread=st.sampled_from([1, 400, 4_000]),
    capacity=st.sampled_from([4096, 1600, 960]),
)
def test_requests_find_and_evict_what_a_pool_of_single_blocks_does(
    seed: int, count: int, spread: int, capacity: int
) -> None:
    cost = replace(COST, kv_capacity_tokens=capacity)
    requests = some_requests(seed, count=count, spread=spread)
    jobs = [
        Job(r.arrival_s, r.prompt_tokens, r.output_tokens, [block for span in r.chain for block in span])
        for r in requests
    ]

    run_alone(requests, cost, check_blocks)
    BlockwiseEngine(cost).run(jobs)

    assert [r.cached_tokens for r in requests] == [job.cached for job in jobs]
    assert [r.num_preemptions for r in requests] == [job.preemptions for job in jobs]
    for request, job in zip(requests, jobs, strict=True):
        assert request.first_token_s == pytest.approx(job.first_s, rel=1e-9, abs=1e-9)
        assert request.finish_s == pytest.approx(job.finish_s, rel=1e-9, abs=1e-9)


def check_blocks(cluster: Cluster) -> None:
    """Blocks used are those of all requests but for what they share, and what is known fits beside them."""
    for instance in cluster.instances:
        cache = instance.prefix_cache
        if cache is None:
            continue
        lengths = [length for _, length in instance.decoding_lengths()]
        lengths += [r.length for r in instance.running() if r.left_tokens]
        blocks = sum(-(-length // BLOCK_TOKENS) for length in lengths)
        assert instance.blocks_used == blocks - cache.num_saved()
        assert cache.num_free <= max(0, instance.blocks_total - instance.blocks_used)


@pytest.mark.parametrize("bandwidth", [None, 5e9])
@pytest.mark.parametrize("name", ["l4", "llumnix", "cache-aware"])
def test_blocks_add_up_whatever_moves(name: str, bandwidth: float | None) -> None:
    """Conversations on short caches: every request ends whole, and the same run gives the same figures."""
    trace = make_sessions("multi-turn", num_requests=250, seed=1, rate_rps=12.0)
    price = MovePrice(bandwidth_bytes_per_s=bandwidth)
    cost = replace(
        COST, pi_ms=0.03, psi_ms=1e-6, gamma_ms=1e-4, kv_capacity_tokens=40_000, max_batched_tokens=2_048
    )
    setting = RunConfig(cost=replace(cost, max_num_seqs=32), num_instances=4, price=price)
    finishes = []
    for observe in (check_blocks, None):
        policy = make_policy(name, trace=trace, setting=setting)
        run = run_policy(policy, trace, setting, observe=observe)
        finishes.append(run.measured.finish_s.tolist())
        assert len(finishes[-1]) == 250
        assert run.result.cached_share is not None
        assert 0.1 < run.result.cached_share < 0.9
    assert finishes[0] == finishes[1]


BIG = replace(COST, kv_capacity_tokens=1_000_000, max_batched_tokens=512, max_num_seqs=32)


def traffic(count: int, *, seed: int = 0) -> Trace:
    """Requests at odd times that have nothing in common, and say so."""
    rng = np.random.default_rng(seed)
    inputs, outputs = rng.integers(1, 3_000, count), rng.integers(1, 200, count)
    chains = Chains()
    return Trace(
        name="distinct",
        arrival_s=np.sort(rng.integers(0, 4_000, count)) * TICK_S * 20.0,
        input_tokens=inputs,
        output_tokens=outputs,
        chains=tuple(
            (chains.new_span((prompt + output) // BLOCK_TOKENS),)
            for prompt, output in zip(inputs.tolist(), outputs.tolist(), strict=True)
        ),
    )


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("two-pool", "random", "power-of-two")])
def test_caches_change_nothing_where_nothing_is_in_common(name: str) -> None:
    """`l4` by stages both times: where content is known it would place requests by another rule."""
    trace = traffic(250)
    setting = RunConfig(cost=BIG, num_instances=4)
    options = L4Options(without=frozenset({"affinity"}))

    with_caches = run_policy(make_policy(name, trace=trace, setting=setting, options=options), trace, setting)
    plain = trace.without_content()
    without = run_policy(make_policy(name, trace=plain, setting=setting), plain, setting)

    assert with_caches.measured.finish_s.tolist() == without.measured.finish_s.tolist()
    assert with_caches.measured.ttft_s.tolist() == without.measured.ttft_s.tolist()
    assert (with_caches.result.cached_share, without.result.cached_share) == (0.0, None)


@pytest.mark.parametrize(
    ("name", "total_s", "preemptions"),
    [
        ("round-robin", 106740.67868204003, 24),
        ("central", 103470.53695481998, 0),
        ("llumnix", 111367.95930772004, 23),
    ],
)
def test_traces_without_content_run_as_they_did_before_there_were_caches(
    name: str, total_s: float, preemptions: int
) -> None:
    """Sums of finish times to the last digit, of commit 3afdb7e; these runs compute sums and roots alone."""
    trace = traffic(400, seed=4).without_content()
    setting = RunConfig(cost=replace(BIG, kv_capacity_tokens=8_192), num_instances=3)

    run = run_policy(make_policy(name, trace=trace, setting=setting), trace, setting)

    assert sum(run.measured.finish_s.tolist()) == total_s
    assert run.result.num_preemptions == preemptions


def made(index: int, at_s: float, chain: Chain, *, prompt: int, output: int = 1) -> SimRequest:
    return SimRequest(index, at_s, prompt_tokens=prompt, output_tokens=output, chain=chain)


def test_a_prompt_is_found_from_the_step_in_which_its_twin_is_scheduled() -> None:
    """All but the last block: its last token must be computed, though all 160 tokens are known."""
    twins = [made(i, 0.0, (range(10),), prompt=160) for i in range(2)]
    cost = replace(BIG, max_batched_tokens=512)

    Cluster(twins, cost=cost, num_instances=1, policy=RoundRobin(), rng=np.random.default_rng(0)).run()

    assert [r.cached_tokens for r in twins] == [0, 144]
    prefill_ms = cost.pi_ms * (160 + 16) + cost.psi_ms * (160 * 80 + 16 * (144 + 8))
    assert twins[1].first_token_s == pytest.approx((cost.alpha_ms + prefill_ms) / 1000.0)


class Mover(Policy):
    """Sends the first request to engine 0 and all others to engine 1; those then move at their first token."""

    def __init__(self, movers: set[int]) -> None:
        self._movers = movers

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        self.cluster.push(request, self.cluster.instances[0 if request.index in self._movers else 1])

    def on_started(self, instance, requests, now_s: float) -> None:  # type: ignore[no-untyped-def]
        for request in requests:
            if request.index in self._movers:
                self.cluster.ask_back(request, instance, None)

    def on_removed(self, instance, request, tag, now_s: float) -> None:  # type: ignore[no-untyped-def]
        self.cluster.send(request, self.cluster.instances[1])


@pytest.mark.parametrize("has_twin", [False, True])
def test_a_move_that_prefills_again_finds_what_its_target_holds(has_twin: bool) -> None:
    """A request moves where its prompt has been served, or another: it waits for its own uncached tokens only."""
    there = made(0, 0.0, (range(60),) if has_twin else (range(500, 560),), prompt=960)
    mover = made(1, 1.0, (range(60), range(900, 901)), prompt=960, output=20)
    cluster = Cluster([there, mover], cost=BIG, num_instances=2, policy=Mover({1}), rng=np.random.default_rng(0))
    cluster.run()

    assert cluster.num_handovers == 1
    assert mover.finish_s is not None
    assert mover.first_token_s is not None
    cached = 960 if has_twin else 0
    context = 961
    again_ms = BIG.alpha_ms * -(-(context - cached) // 512) + BIG.prefill_ms(context, cached_tokens=cached)
    decodes_ms = sum(BIG.alpha_ms + BIG.beta_ms + BIG.gamma_ms * (context + k) for k in range(1, 19))
    step_ms = BIG.alpha_ms + BIG.beta_ms + BIG.gamma_ms * context  # it decodes once before it is released
    spent_ms = (mover.finish_s - mover.first_token_s) * 1000.0
    assert spent_ms == pytest.approx(again_ms + decodes_ms + 20.0, abs=step_ms)


def test_transfers_wait_for_each_other_on_a_link_and_take_time_from_busy_engines() -> None:
    """Each has 1 s of KV. Two with one source follow each other; one between others does not wait."""
    engines = [Instance(index, cost=BIG) for index in range(4)]
    engines[1].push(made(0, 0.0, (), prompt=100, output=9))
    engines[1].start_segment(0.0)
    links = Links(MovePrice(bandwidth_bytes_per_s=1e6, kv_bytes_per_token=1_000, fixed_ms=20.0), cost=BIG)

    ends = [(0, 1), (0, 2), (3, 1), (2, 3)]
    landed = [links.landed_s(5.0, 1_000, source=engines[a], target=engines[b]) for a, b in ends]

    assert landed == pytest.approx([6.02, 7.02, 7.02, 8.02])
    assert [engine.copy_ms for engine in engines] == pytest.approx([0.0, 2 * 1_000 * BIG.gamma_ms, 0.0, 0.0])


def test_a_copy_lengthens_the_next_segment_and_no_other() -> None:
    """An interrupt falls on a step boundary after the time that is lost."""
    engine = Instance(0, cost=replace(BIG, gamma_ms=0.0, sigma_ms=0.0))
    engine.push(made(0, 0.0, (), prompt=16, output=50))
    engine.start_segment(0.0)
    engine.finish_segment()
    engine.copy_kv(7.0)
    begun_s = engine.now_s
    engine.start_segment(begun_s)
    assert engine.end_s == pytest.approx(begun_s + (49 * 5.3 + 7.0) / 1000.0)

    assert engine.interrupt(begun_s + 0.020)
    assert engine.end_s == pytest.approx(begun_s + (3 * 5.3 + 7.0) / 1000.0)
    engine.finish_segment()
    engine.start_segment(engine.now_s)
    assert engine.end_s == pytest.approx(begun_s + (49 * 5.3 + 7.0) / 1000.0)

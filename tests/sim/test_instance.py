"""The engine model: closed form against a step-by-step oracle, vLLM's rules, conservation."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.cost.step import BatchShape, StepCost
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.instance import BLOCK_TOKENS, Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.length_blind import RoundRobin
from tests.sim.small_engine import COST, TICK_S, run_alone


@dataclass(eq=False)
class OracleRequest:
    arrival_s: float
    prompt: int
    output: int
    generated: int = 0
    computed: int = 0
    target: int = 0
    first_s: float = math.nan
    finish_s: float = math.nan
    preemptions: int = 0

    @property
    def length(self) -> int:
        return self.prompt + self.generated


@dataclass
class StepwiseEngine:
    """vLLM's loop written out, one step at a time, blocks counted request by request."""

    cost: StepCost
    running: list[OracleRequest] = field(default_factory=list)
    waiting: deque[OracleRequest] = field(default_factory=deque)

    def is_decoding(self, request: OracleRequest) -> bool:
        return request.computed >= request.target

    def blocks(self) -> int:
        return sum(-(-(r.length if self.is_decoding(r) else r.target) // BLOCK_TOKENS) for r in self.running)

    def step(self, now_s: float) -> float:
        total = self.cost.kv_capacity_tokens // BLOCK_TOKENS
        has_preempted = False
        while self.blocks() > total and len(self.running) > 1:
            victim = self.running.pop()
            victim.computed = 0
            victim.preemptions += 1
            self.waiting.appendleft(victim)
            has_preempted = True
        decodes = [r for r in self.running if self.is_decoding(r)]
        budget = self.cost.max_batched_tokens - len(decodes)
        share = budget if len(self.running) + len(self.waiting) == 1 else self.cost.max_chunk_tokens
        chunks: list[tuple[OracleRequest, int]] = []
        for request in self.running:
            if not self.is_decoding(request) and budget > 0:
                chunk = min(budget, share, request.target - request.computed)
                chunks.append((request, chunk))
                budget -= chunk
        while self.waiting and budget > 0 and not has_preempted and len(self.running) < self.cost.max_num_seqs:
            request = self.waiting[0]
            if self.blocks() - (-request.length // BLOCK_TOKENS) > total and self.running:
                break
            self.waiting.popleft()
            request.computed, request.target = 0, request.length
            self.running.append(request)
            chunk = min(budget, share, request.target)
            chunks.append((request, chunk))
            budget -= chunk
        lengths = [r.length for r in decodes]
        shape = BatchShape(
            num_decodes=len(lengths),
            context_tokens=sum(lengths),
            prefill_tokens=sum(c for _, c in chunks),
            prefill_pairs=sum(c * (r.computed + c / 2) for r, c in chunks),
            skew_tokens=len(lengths) * max(lengths) - sum(lengths) if lengths else 0,
        )
        end_s = now_s + self.cost.step_ms(shape) / 1000.0
        for request, chunk in chunks:
            request.computed += chunk
        for request in decodes + [r for r, _ in chunks if self.is_decoding(r)]:
            request.generated += 1
            if math.isnan(request.first_s):
                request.first_s = end_s
            if request.generated == request.output:
                request.finish_s = end_s
                self.running.remove(request)
        return end_s

    def run(self, requests: list[OracleRequest]) -> None:
        left = deque(requests)
        now_s = 0.0
        while left or self.running or self.waiting:
            while left and left[0].arrival_s <= now_s:
                self.waiting.append(left.popleft())
            if not self.running and not self.waiting:
                now_s = left[0].arrival_s
                continue
            now_s = self.step(now_s)


def check_conservation(cluster: Cluster) -> None:
    """Every arrived request is in one place; the sums kept incrementally equal sums taken afresh."""
    in_engines = sum(i.num_requests for i in cluster.instances)
    assert cluster.num_arrived == (
        cluster.num_finished + in_engines + cluster.policy.num_queued + cluster.num_in_transit
    )
    for instance in cluster.instances:
        decoding = [length for _, length in instance.decoding_lengths()]
        prefilling = [r for r in instance.running() if r.left_tokens]
        waiting = [r for r in instance.waiting() if not r.has_kv]
        assert instance.num_decodes == len(decoding)
        assert instance.context_tokens == sum(decoding)
        blocks = [-(-n // BLOCK_TOKENS) for n in [*decoding, *(r.length for r in prefilling)]]
        assert instance.blocks_used == sum(blocks)
        pending = [r.length for r in [*prefilling, *waiting]]
        assert instance.pending_tokens == sum(pending)
        assert instance.longest_prefill_tokens == max(pending, default=0)


LOADS = st.lists(
    st.tuples(st.integers(0, 500), st.integers(1, 700), st.one_of(st.integers(1, 6), st.integers(1, 400))),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(load=LOADS, sigma_ms=st.sampled_from([0.0, 0.002]), capacity=st.sampled_from([1120, 1600, 4096]))
def test_closed_form_equals_the_step_by_step_engine(
    load: list[tuple[int, int, int]], sigma_ms: float, capacity: int
) -> None:
    """First-token and finish times and preemption counts agree with vLLM's loop written out."""
    cost = StepCost(**{**COST.to_dict(), "sigma_ms": sigma_ms, "kv_capacity_tokens": capacity})
    rows = sorted((ticks * TICK_S, prompt, output) for ticks, prompt, output in load)
    requests = [SimRequest(i, a, prompt_tokens=p, output_tokens=o) for i, (a, p, o) in enumerate(rows)]
    oracle = [OracleRequest(a, p, o) for a, p, o in rows]

    run_alone(requests, cost, check_conservation)
    StepwiseEngine(cost).run(oracle)

    assert [r.first_token_s for r in requests] == pytest.approx([o.first_s for o in oracle], abs=1e-7)
    assert [r.finish_s for r in requests] == pytest.approx([o.finish_s for o in oracle], abs=1e-7)
    assert [r.num_preemptions for r in requests] == [o.preemptions for o in oracle]


def run_one(requests: list[SimRequest], cost: StepCost = COST) -> Cluster:
    cluster = Cluster(
        requests,
        cost=cost,
        num_instances=1,
        policy=RoundRobin(),
        rng=np.random.default_rng(0),
        observe=check_conservation,
    )
    cluster.run()
    return cluster


def test_a_lone_request_takes_the_sum_of_its_steps() -> None:
    """Two prefill chunks of 128 and 72 tokens, then 9 decode steps at contexts 201..209."""
    request = SimRequest(0, 1.0, prompt_tokens=200, output_tokens=10)
    run_one([request])

    prefill_ms = 2 * 5.0 + 0.1 * 200 + 0.001 * (128 * 64 + 72 * (128 + 36))
    decode_ms = sum(5.0 + 0.3 + 0.01 * context for context in range(201, 210))
    assert request.first_token_s == pytest.approx(1.0 + prefill_ms / 1000)
    assert request.finish_s == pytest.approx(1.0 + (prefill_ms + decode_ms) / 1000)


def test_a_full_cache_preempts_the_request_admitted_last() -> None:
    """The second of two growing requests loses its cache; the first never does; both finish."""
    cost = StepCost(**{**COST.to_dict(), "kv_capacity_tokens": 640})
    requests = [SimRequest(i, 0.0, prompt_tokens=100, output_tokens=400) for i in range(2)]
    run_one(requests, cost)

    assert requests[0].num_preemptions == 0
    assert requests[1].num_preemptions == 1
    assert all(r.finish_s is not None for r in requests)


def test_one_request_longer_than_the_cache_still_ends() -> None:
    """Alone in the batch nobody can be preempted; the run must not hang."""
    cost = StepCost(**{**COST.to_dict(), "kv_capacity_tokens": 64})
    request = SimRequest(0, 0.0, prompt_tokens=60, output_tokens=100)
    run_one([request], cost)

    assert request.finish_s is not None


def test_what_has_run_before_decodes_beside_a_long_prefill() -> None:
    """A moved request with its cache, last to come, waits for one step and not for the prompt before it."""
    instance = Instance(0, cost=COST)
    long = SimRequest(0, 0.0, prompt_tokens=1000, output_tokens=1)
    moved, late = (SimRequest(i, 0.0, prompt_tokens=40, output_tokens=20) for i in (1, 2))
    for request in (moved, late):
        request.generated, request.has_kv = 10, True
    instance.push(long)
    instance.push(moved)
    assert list(instance.waiting()) == [moved, long]
    instance.start_segment(0.0)
    instance.finish_segment()
    instance.push(late)
    assert instance.end_s is None
    instance.start_segment(instance.now_s)
    instance.finish_segment()
    assert [request for request, _ in instance.decoding_lengths()] == [moved, late]


def test_an_arrival_ends_a_decode_run_at_the_next_step_boundary() -> None:
    """The newcomer's prefill starts within one decode step of its arrival."""
    old = SimRequest(0, 0.0, prompt_tokens=16, output_tokens=4000)
    new = SimRequest(1, 2.0, prompt_tokens=16, output_tokens=1)
    cost = StepCost(**{**COST.to_dict(), "kv_capacity_tokens": 40_000})
    run_one([old, new], cost)

    step_s = (
        cost.step_ms(BatchShape(num_decodes=1, context_tokens=16 + 400, prefill_tokens=16, prefill_pairs=128))
        / 1e3
    )
    assert new.first_token_s is not None
    assert 2.0 < new.first_token_s < 2.0 + 2 * step_s

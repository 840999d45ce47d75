"""The emulated batch: held against the simulator's engine, its tokens, its limits."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.cost.step import StepCost
from l4queue.models import SamplingParams
from l4queue.policy.prefix_blocks import next_key
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.length_blind import RoundRobin
from tests.sim.small_engine import COST as SMALL
from tests.sim.small_engine import TICK_S
from workers.engine.base import EngineRequest, FinishReason
from workers.engine.emulated.scheduler import BLOCK_TOKENS, EmulatedBatch, next_token

COST = replace(SMALL, kv_capacity_tokens=1600)


def request(name: str, ids: list[int], max_tokens: int, **more: object) -> EngineRequest:
    """An engine request with plain parameters."""
    params = more.pop("params", SamplingParams())
    fields = {"min_tokens": 0, **more}
    return EngineRequest(request_id=name, token_ids=ids, max_tokens=max_tokens, params=params, **fields)  # type: ignore[arg-type]


def run_out(batch: EmulatedBatch) -> dict[str, list[int]]:
    """Step until nothing is left; the tokens of each request."""
    out: dict[str, list[int]] = {}
    while batch:
        batch.schedule()
        for output in batch.finish():
            out.setdefault(output.request_id, []).extend(output.token_ids)
    return out


@settings(max_examples=80, deadline=None)
@given(
    load=st.lists(
        st.tuples(st.integers(0, 500), st.integers(1, 700), st.integers(1, 300)), min_size=1, max_size=12
    ),
    capacity=st.sampled_from([1120, 1600, 4096]),
)
def test_the_emulated_engine_and_the_simulator_batch_alike(
    load: list[tuple[int, int, int]], capacity: int
) -> None:
    """First-token and finish times agree with the simulator's closed form, preemptions included."""
    cost = StepCost(**{**COST.to_dict(), "kv_capacity_tokens": capacity})
    rows = sorted((ticks * TICK_S, prompt, output) for ticks, prompt, output in load)
    simulated = [SimRequest(i, a, prompt_tokens=p, output_tokens=o) for i, (a, p, o) in enumerate(rows)]
    rng = np.random.default_rng(0)
    Cluster(simulated, cost=cost, num_instances=1, policy=RoundRobin(), rng=rng).run()

    batch, left, now_s = EmulatedBatch(cost), deque(enumerate(rows)), 0.0
    first_s: dict[int, float] = {}
    finish_s: dict[int, float] = {}
    while left or batch:
        if not batch:
            now_s = max(now_s, left[0][1][0])
        while left and left[0][1][0] <= now_s:
            index, (_, prompt, output) = left.popleft()
            batch.add(request(str(index), [index] * prompt, output))
        now_s += cost.step_ms(batch.schedule()) / 1000
        for out in batch.finish():
            first_s.setdefault(int(out.request_id), now_s)
            if out.finish_reason is not None:
                finish_s[int(out.request_id)] = now_s

    assert [first_s[i] for i in range(len(rows))] == pytest.approx([r.first_token_s for r in simulated], abs=1e-7)
    assert [finish_s[i] for i in range(len(rows))] == pytest.approx([r.finish_s for r in simulated], abs=1e-7)
    assert batch.num_preempted == sum(r.num_preemptions for r in simulated)
    assert batch.kv_used_tokens == 0


def texts(seed: int, *, count: int) -> list[list[int]]:
    """Prompts of conversations: one common beginning, some go on from the prompt and output of an earlier one."""
    rng = np.random.default_rng(seed)
    made: list[list[int]] = []
    for _ in range(count):
        earlier = made[int(rng.integers(len(made)))] if made and rng.random() < 0.7 else list(range(40))
        made.append([*earlier, *rng.integers(0, 8000, int(rng.choice([0, 1, 15, 16, 100, 300]))).tolist()][:700])
    return made


def whole(prompt: list[int], num_tokens: int) -> list[int]:
    """Prompt and output."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_token(ids))
    return ids


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    load=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 60)), min_size=1, max_size=12),
    capacity=st.sampled_from([1120, 1600, 4096]),
)
def test_the_emulated_engine_finds_in_its_prefix_cache_what_the_simulator_does(
    seed: int, load: list[tuple[int, int]], capacity: int
) -> None:
    """Cached tokens of each request, and so the times, where prompts share beginnings and blocks are evicted."""
    cost = replace(COST, kv_capacity_tokens=capacity)
    rows = [(ticks * TICK_S, output) for ticks, output in sorted(load)]
    prompts = texts(seed, count=len(rows))
    numbers: dict[bytes, int] = {}
    simulated = []
    for index, ((arrival_s, output), prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids, key, chain = whole(prompt, output), b"", []
        for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = next_key(key, ids[start : start + BLOCK_TOKENS])
            number = numbers.setdefault(key, len(numbers))
            chain.append(range(number, number + 1))
        simulated.append(
            SimRequest(index, arrival_s, prompt_tokens=len(prompt), output_tokens=output, chain=tuple(chain))
        )
    Cluster(simulated, cost=cost, num_instances=1, policy=RoundRobin(), rng=np.random.default_rng(0)).run()

    batch, left, now_s = EmulatedBatch(cost, has_prefix_cache=True), deque(enumerate(rows)), 0.0
    found: dict[int, int | None] = {}
    finish_s: dict[int, float] = {}
    while left or batch:
        if not batch:
            now_s = max(now_s, left[0][1][0])
        while left and left[0][1][0] <= now_s:
            index, (_, output) = left.popleft()
            batch.add(request(str(index), prompts[index], output))
        now_s += cost.step_ms(batch.schedule()) / 1000
        for out in batch.finish():
            if out.cached is not None:
                assert int(out.request_id) not in found
                found[int(out.request_id)] = out.cached.found_tokens
            if out.finish_reason is not None:
                finish_s[int(out.request_id)] = now_s

    assert [found[i] for i in range(len(rows))] == [r.cached_tokens for r in simulated]
    assert [finish_s[i] for i in range(len(rows))] == pytest.approx([r.finish_s for r in simulated], abs=1e-7)
    assert batch.num_preempted == sum(r.num_preemptions for r in simulated)
    assert batch.kv_used_tokens == 0


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 2**40), min_size=1, max_size=60),
    length=st.integers(2, 60),
    data=st.data(),
)
def test_a_resumed_request_goes_on_as_if_never_cut(prompt: list[int], length: int, data: st.DataObject) -> None:
    """Prompt plus generated ids as a new prompt gives the same rest, alone or beside others."""
    cut = data.draw(st.integers(1, length - 1))
    whole = EmulatedBatch(COST)
    whole.add(request("a", prompt, length))
    tokens = run_out(whole)["a"]
    assert tokens[0] == next_token(prompt)

    resumed = EmulatedBatch(COST)
    resumed.add(request("other", [1, 2, 3], 40))
    resumed.add(request("a", prompt + tokens[:cut], length - cut))

    assert run_out(resumed)["a"] == tokens[cut:]


@pytest.mark.parametrize("at", [0, 499, 999])
def test_every_id_of_the_prefix_decides_the_tokens(at: int) -> None:
    """One changed, lost or doubled id, however far back, gives another output."""
    ids = list(range(1000))
    outputs = []
    for variant in (
        ids,
        [*ids[:at], 7777, *ids[at + 1 :]],
        [*ids[:at], *ids[at + 1 :]],
        [*ids[:at], at, *ids[at:]],
    ):
        batch = EmulatedBatch(COST)
        batch.add(request("a", variant, 8))
        outputs.append(tuple(run_out(batch)["a"]))

    assert len(set(outputs)) == 4


def test_tokens_vary() -> None:
    """A long output has no short cycle and spreads over the vocabulary."""
    batch = EmulatedBatch(StepCost(**{**COST.to_dict(), "kv_capacity_tokens": 10_000}))
    batch.add(request("a", [1], 5000))
    tokens = run_out(batch)["a"]

    assert len(set(tokens)) > 3000
    assert 100 <= min(tokens) < 120
    assert 7980 < max(tokens) < 8000


def test_the_lower_priority_number_is_admitted_first_and_preempted_last() -> None:
    """With one seat, priority then arrival decides; with a full cache, the last in that order gives way."""
    one_seat = EmulatedBatch(StepCost(**{**COST.to_dict(), "max_num_seqs": 1}))
    for name, priority in (("late", 5), ("a", 0), ("b", 0), ("urgent", -5)):
        one_seat.add(request(name, [1], 2, priority=priority))
    assert list(run_out(one_seat)) == ["urgent", "a", "b", "late"]

    tight = EmulatedBatch(StepCost(**{**COST.to_dict(), "kv_capacity_tokens": 320}))
    tight.add(request("patient", [1] * 60, 200, priority=9))
    tight.add(request("urgent", [2] * 60, 200, priority=-9))
    last: dict[str, int] = {}
    step = 0
    while tight:
        tight.schedule()
        step += 1
        last.update({output.request_id: step for output in tight.finish()})
    assert tight.num_preempted > 0
    assert last["urgent"] < last["patient"]


def test_what_brings_its_cache_decodes_beside_a_long_prefill() -> None:
    """It enters with the next step; without a share for others it would wait for the whole prompt."""
    batch = EmulatedBatch(COST)
    batch.add(request("long", [1] * 1000, 1))
    alone = batch.schedule()
    assert alone.prefill_tokens == COST.max_batched_tokens
    batch.finish()

    batch.add(request("other", [3] * 500, 1, priority=1))
    batch.add(request("moved", [2] * 50, 3), loaded_tokens=49)
    shape = batch.schedule()
    assert shape.prefill_tokens == COST.max_batched_tokens
    assert [output.request_id for output in batch.finish()] == ["moved"]
    shape = batch.schedule()
    assert (shape.num_decodes, shape.prefill_tokens) == (1, COST.max_batched_tokens - 1)
    assert [output.request_id for output in batch.finish()] == ["moved"]


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    """Not even an urgent newcomer that would fit: as in vLLM, it waits for the next step."""

    def steps(*, urgent_before: int | None) -> tuple[int, list[int]]:
        batch = EmulatedBatch(StepCost(**{**COST.to_dict(), "kv_capacity_tokens": 320}))
        for name in "ab":
            batch.add(request(name, [1] * 60, 200, priority=9))
        number, came_out, preempting = 0, list[int](), 0
        while batch:
            number += 1
            if number == urgent_before:
                batch.add(request("urgent", [2], 1))
            batch.schedule()
            preempting = preempting or (number if batch.num_preempted else 0)
            came_out += [number for output in batch.finish() if output.request_id == "urgent"]
        return preempting, came_out

    preempting, _ = steps(urgent_before=None)
    assert steps(urgent_before=preempting) == (preempting, [preempting + 1])
    assert steps(urgent_before=preempting - 40)[1] == [preempting - 40]


def test_a_stop_token_ends_the_output_but_not_before_min_tokens() -> None:
    """The token is kept, as vLLM keeps it."""
    batch = EmulatedBatch(COST)
    batch.add(request("plain", [5, 6], 30))
    tokens = run_out(batch)["plain"]
    params = SamplingParams(stop_token_ids=(tokens[4], tokens[9]))

    ends = {}
    for min_tokens in (0, 6):
        batch.add(request("stop", [5, 6], 30, params=params, min_tokens=min_tokens))
        outputs = []
        while batch:
            batch.schedule()
            outputs += batch.finish()
        assert outputs[-1].finish_reason is FinishReason.STOP
        ends[min_tokens] = len(outputs)

    assert ends == {0: 5, 6: 10}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), max_size=10))
def test_aborting_anything_at_any_time_leaves_the_others_alone(
    data: st.DataObject, rows: list[tuple[int, int]]
) -> None:
    """Nothing comes out for an aborted request, all of it for the rest; no block leaks."""
    batch, out = EmulatedBatch(COST), {str(i): 0 for i in range(len(rows))}
    gone: set[str] = set()
    for index, (prompt, output) in enumerate(rows):
        batch.add(request(str(index), [index] * prompt, output))
    while batch:
        shape = batch.schedule()
        assert shape.num_decodes + shape.prefill_tokens <= COST.max_batched_tokens
        assert batch.num_running <= COST.max_num_seqs
        assert batch.kv_used_tokens <= COST.kv_capacity_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        if data.draw(st.integers(0, 9)) == 0:
            victims = data.draw(st.sets(st.sampled_from([*out, "unknown"])))
            batch.abort(victims)
            gone |= victims
        for item in batch.finish():
            assert item.request_id not in gone
            out[item.request_id] += len(item.token_ids)

    assert batch.kv_used_tokens == batch.num_running == batch.num_waiting == 0
    assert all(count == rows[int(i)][1] for i, count in out.items() if i not in gone)


def test_an_id_that_is_there_already_is_refused() -> None:
    """Two requests of one id would be told apart by nothing."""
    batch = EmulatedBatch(COST)
    batch.add(request("a", [1], 1))

    with pytest.raises(ValueError, match="in the engine already"):
        batch.add(request("a", [1], 1))

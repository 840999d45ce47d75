"""Prefix affinity as one of the planner's candidates: published where a replay proves it, and only there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cli.bench.traffic import bench_trace
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.planner import Decision, PlannerSettings, Snapshot, plan
from l4queue.planning.shadow import decide
from l4queue.planning.traffic_change import Learned, with_decision
from l4queue.sim import replay
from l4queue.sim.records import (
    FEWEST_TOLD,
    Changed,
    RecordedArrival,
    arrivals_of,
    chains_of,
    record_of,
    told_share,
)
from l4queue.sim.replay import make_replay
from l4queue.sim.traces.sessions import make_sessions
from tests.sim.small_engine import GPU

BUCKETS = Buckets.log_spaced(32_768)
CPU = StepCost(alpha_ms=4.2, beta_ms=0.33, gamma_ms=6e-4, pi_ms=0.085, psi_ms=4.8e-5, kv_capacity_tokens=262_144)
LINK = MovePrice(bandwidth_bytes_per_s=750e6, kv_bytes_per_token=4096, fixed_ms=50.0)
SETTINGS = PlannerSettings(min_life_ms=0)


def one_stage(workers: int, *, prefix_affinity: bool = False) -> Plan:
    """A plan in force for all."""
    ids = tuple(f"w{number}" for number in range(workers))
    stage = StagePlan(low_tokens=0, high_tokens=None, num_workers=workers, worker_ids=ids)
    details = {"is_replayed": prefix_affinity, "is_proven": prefix_affinity}
    return Plan(version=1, stages=(stage,), prefix_affinity=prefix_affinity, details=details)


def snapshot(record: Sequence[RecordedArrival], present: Plan, cost: StepCost) -> Snapshot:
    """The deployment when this traffic has come."""
    lengths = [a.input_tokens for a in record], [a.output_tokens for a in record]
    return Snapshot(
        now_ms=10**7,
        plan=present,
        loads=tuple(WorkerLoad(worker_id=name) for name in present.stages[0].worker_ids),
        demand=Demand.of_requests(BUCKETS, *lengths, duration_s=record[-1].arrival_s),
        cost=cost,
        buckets=BUCKETS,
    )


def decided(
    record: Sequence[RecordedArrival], present: Plan, cost: StepCost, *, has_content: bool = True
) -> Decision:
    """By a replay of this record, with or without the content of its prompts."""
    known = record if has_content else [replace(a, blocks=b"") for a in record]
    workers = present.stages[0].num_workers
    replays = make_replay(known, cost=cost, num_instances=workers, price=LINK)
    assert replays is not None
    return plan(snapshot(record, present, cost), SETTINGS, replay=replays)


def conversations(seed: int = 1) -> list[RecordedArrival]:
    """Agents on four engines: most of each prompt has been there before."""
    return arrivals_of(make_sessions("agent", num_requests=360, seed=seed, rate_rps=5.0))


def race(seed: int = 3, rate: float = 9.0) -> list[RecordedArrival]:
    """The traffic of docs/routers.md on two engines: all prompts are new."""
    return arrivals_of(bench_trace(None, "mixed", rate=rate, duration_s=160.0, seed=seed))


def test_conversations_get_affinity_and_keep_it() -> None:
    """By a gain that the closed form knows nothing of; the same traffic on another day changes nothing."""
    first = decided(conversations(), one_stage(4), GPU)

    assert first.publish
    assert first.plan.prefix_affinity
    assert len(first.plan.stages) == 1
    assert first.reason.startswith("prefix affinity: gain ")
    assert first.plan.details["is_proven"]
    assert [c["prefix_affinity"] for c in first.plan.details["candidates"] if "prefix_affinity" in c] == [True]
    for seed in (2, 3):
        again = decided(conversations(seed), first.plan, GPU)
        assert not again.publish
        assert again.plan.prefix_affinity


def test_what_is_not_told_wins_nothing() -> None:
    """The same traffic without its content: no such candidate."""
    decision = decided(conversations(), one_stage(4), GPU, has_content=False)

    assert not any(one.prefix_affinity for one in decision.candidates)
    assert not decision.plan.prefix_affinity


@pytest.mark.parametrize("rate", [7.0, 9.0])
def test_where_nothing_repeats_stages_are_as_ever(rate: float) -> None:
    """Content that is told and never comes again makes no difference."""
    record = race(rate=rate)
    with_it, without = (decided(record, one_stage(2), CPU, has_content=told_it) for told_it in (True, False))

    assert without.publish
    assert len(without.plan.stages) == 2
    assert with_it == without


def test_hits_that_do_not_pay_leave_stages() -> None:
    """Long prompts begin alike, by a fifth of their tokens: classes gain far more than that."""
    alike = b"".join(number.to_bytes(8, "big") for number in range(7))
    record = [replace(a, blocks=alike + a.blocks[len(alike) :]) if a.input_tokens > 1000 else a for a in race()]
    decision = decided(record, one_stage(2), CPU)

    assert decision.publish
    assert len(decision.plan.stages) == 2
    assert any(one.prefix_affinity for one in decision.candidates)


def test_it_goes_when_nothing_repeats_any_more() -> None:
    """Back to stages, by a gain beyond chance."""
    decision = decided(race(), one_stage(2, prefix_affinity=True), CPU)

    assert decision.publish
    assert not decision.plan.prefix_affinity
    assert len(decision.plan.stages) == 2


def test_without_a_replay_it_stays() -> None:
    """Also where workers come or go: the closed form would have classes for this demand."""
    record, present = race(), one_stage(2, prefix_affinity=True)
    now, learned = snapshot(record, present, CPU), with_decision(Learned.nothing(BUCKETS, now_s=0.0))
    kept = decide(now, SETTINGS, None, learned=learned)
    more = (*now.loads, WorkerLoad(worker_id="w2"))
    grown = decide(replace(now, loads=more), SETTINGS, None, learned=learned)

    assert (kept.publish, kept.plan) == (False, present)
    assert (grown.publish, grown.plan.prefix_affinity, len(grown.plan.stages)) == (True, True, 1)
    assert grown.plan.stages[0].num_workers == 3
    assert decide(replace(now, plan=one_stage(2)), SETTINGS, None, learned=learned).plan.prefix_affinity is False


def test_at_another_rate_what_came_again_comes_again_and_no_more() -> None:
    """Requests drawn with replacement would find themselves in the caches."""
    record = conversations()
    alike = [replace(a, e2e_s=0.5) for a in record]
    demand = snapshot(record, one_stage(4), GPU).demand
    half = replace(demand, arrivals_per_s=demand.arrivals_per_s / 2)
    changed = Changed(begun_s=record[-30].arrival_s, mix_begun_s=0.0, demand=half, buckets=BUCKETS)
    found = record_of(alike, changed=changed, max_requests=1500)

    assert found is not None
    known = [a.blocks for a in alike]
    assert [a.blocks for a in found] == known[: len(found)]
    assert len(found) > 320
    span_s = found[-1].arrival_s - found[0].arrival_s
    assert span_s == pytest.approx(2 * (record[len(found) - 1].arrival_s - record[0].arrival_s), rel=0.15)

    drawn = record_of([replace(a, blocks=b"") for a in alike], changed=changed, max_requests=1500)
    assert drawn is not None
    assert [a.input_tokens for a in drawn] != [a.input_tokens for a in found]


def test_requests_drawn_by_length_tell_no_content() -> None:
    """Another mix than any that is known; where it is needed there is no record."""
    record = [replace(a, e2e_s=0.5) for a in conversations()]
    demand = snapshot(record, one_stage(4), GPU).demand
    changed = Changed(
        begun_s=record[-30].arrival_s, mix_begun_s=record[-30].arrival_s, demand=demand, buckets=BUCKETS
    )
    found = record_of(record, changed=changed, max_requests=1500)

    assert found is not None
    assert chains_of(found) is None
    assert record_of(record, changed=changed, max_requests=1500, needs_content=True) is None


def test_chains_are_those_of_the_traffic() -> None:
    """Requests share as many leading blocks as their keys; the rest is their own."""
    shared = b"".join(number.to_bytes(8, "big") for number in range(3))
    first, second, third = (
        RecordedArrival(arrival_s=0.0, input_tokens=tokens, output_tokens=20, blocks=blocks)
        for tokens, blocks in ((3 * 128 + 5, shared), (2 * 128, shared[:16]), (4 * 128, b""))
    )
    chains = chains_of([first, second, third])

    assert chains is not None
    flat = [[block for span in chain for block in span] for chain in chains]
    assert [len(blocks) for blocks in flat] == [
        (3 * 128 + 25) // 128,
        (2 * 128 + 20) // 128,
        (4 * 128 + 20) // 128,
    ]
    assert flat[1][:2] == flat[0][:2]
    assert len({*flat[0], *flat[1], *flat[2]}) == sum(map(len, flat)) - 2
    assert chains_of([first, third, replace(third, input_tokens=9000), second]) is None  # a fiftieth comes again


@pytest.mark.parametrize("seed", [1, 2])
def test_what_affinity_ends_early_would_not_have_won(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages held against affinity are not all played to the end; the decision is that of whole replays."""
    record = conversations(seed)
    found = decided(record, one_stage(4), GPU)
    monkeypatch.setattr(replay, "_WORSE_THAN_AFFINITY", float("inf"))
    monkeypatch.setattr(replay, "_CLEARLY_WORSE", float("inf"))
    whole = decided(record, one_stage(4), GPU)

    assert [_split(one) for one in (found.plan, whole.plan)] == [(True, [0])] * 2
    assert found.reason == whole.reason
    scores = [
        (one.scored or 0.0, other.scored) for one, other in zip(found.candidates, whole.candidates, strict=True)
    ]
    assert any(one != other for one, other in scores)
    best = min(one for one, _ in scores)
    assert all(one == other or one > 1.03 * best for one, other in scores)


def _split(chosen: Plan) -> tuple[bool, list[int]]:
    return chosen.prefix_affinity, [stage.low_tokens for stage in chosen.stages]


def told(tokens: int, *keys: int) -> RecordedArrival:
    """A prompt with these blocks."""
    blocks = b"".join(key.to_bytes(8, "big") for key in keys)
    return RecordedArrival(arrival_s=0.0, input_tokens=tokens, output_tokens=1, blocks=blocks)


@given(st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=FEWEST_TOLD, max_size=FEWEST_TOLD + 20))
def test_the_share_told_is_that_of_tokens_in_blocks_seen_before(prompts: list[list[int]]) -> None:
    """Counted block by block, from the first prompt on of which anything was told; of fewer nothing is said."""
    record = [told(128 * len(keys) + 50, *keys) for keys in prompts]
    begun = [keys for number, keys in enumerate(prompts) if any(prompts[: number + 1])]
    before = [{key for earlier in begun[:number] for key in earlier} for number in range(len(begun))]
    num_seen = sum(key in seen for keys, seen in zip(begun, before, strict=True) for key in keys)
    num_tokens = sum(128 * len(keys) + 50 for keys in begun)

    expected = 128 * num_seen / num_tokens if len(begun) >= FEWEST_TOLD else 0.0
    assert told_share(record) == pytest.approx(expected)
    assert told_share([told(10_000), *record]) == told_share(record)
    assert told_share(record[: FEWEST_TOLD - 1]) == 0.0

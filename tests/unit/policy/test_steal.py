"""Stealing: lowers the later finish, never flips it, never bounces."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.move import MovePrice
from l4queue.models import WorkerLoad
from l4queue.policy.loads import StageLoad, request_work_ms, running_work_ms, stage_load
from l4queue.policy.steal import (
    Ask,
    Bid,
    RunningRequest,
    Steal,
    StealFrom,
    StealLimits,
    ask,
    bid,
    match,
    steal_waiting,
)

COST = load_coefficients("h100", "llama-3.1-8b")
IDLE = WorkerLoad(worker_id="t", kv_capacity_tokens=445_000, max_running=256)
OUTPUT = 300.0


def _stage(stage: int, *, queued: int, tokens: int, workers: int = 2, running: int = 40) -> StageLoad:
    loads = [
        WorkerLoad(worker_id=f"s{stage}-{i}", num_running=running, context_tokens=running * 1000)
        for i in range(workers)
    ]
    return stage_load(
        stage, loads, queued_requests=queued, queued_tokens=tokens, expected_output_tokens=OUTPUT, cost=COST
    )


def _steal(siblings: list[StageLoad], *, own_stage: int = 0, thief: WorkerLoad = IDLE, **changes: object) -> Steal:
    values: dict[str, object] = {
        "own": _stage(own_stage, queued=0, tokens=0, workers=1, running=thief.num_running),
        "siblings": siblings,
        "head_tokens": {},
        "max_requests": 8,
        "expected_output_tokens": OUTPUT,
        "cost": COST,
    }
    return steal_waiting(thief, **{**values, **changes})  # type: ignore[arg-type]  # test data by name


def test_an_idle_worker_steals_from_the_longest_queue() -> None:
    """Of two overloaded siblings the one with the longer drain is the victim."""
    decision = _steal([_stage(1, queued=5, tokens=5000), _stage(2, queued=50, tokens=50_000)])

    assert decision.stage == 2
    assert 1 <= decision.num_requests <= 8
    assert decision.benefit_ms > decision.cost_ms


@given(
    st.integers(0, 100),
    st.integers(1, 60),
    st.integers(1, 60_000),
    st.integers(1, 6),
    st.integers(0, 200),
    st.integers(0, 60_000),
)
def test_a_steal_lowers_the_later_finish_and_leaves_the_victim_the_later(
    busy: int, queued: int, mean: int, workers: int, running: int, pending: int
) -> None:
    """After the steal the thief is done before the victim would have been: the maximum falls."""
    thief = replace(IDLE, num_running=busy, context_tokens=busy * 500, pending_prefill_tokens=pending)
    victim = _stage(1, queued=queued, tokens=queued * mean, workers=workers, running=running)

    decision = _steal([victim], thief=thief)

    assume(decision.stage is not None)
    before = running_work_ms(busy, busy * 500, expected_remaining_tokens=OUTPUT / 2, cost=COST)
    before += COST.prefill_ms(pending)
    work = request_work_ms(mean, expected_output_tokens=OUTPUT, cost=COST)
    assert victim.drain_ms is not None
    assert before + work < victim.drain_ms
    if decision.num_requests > 1:
        after_victim = victim.drain_ms - decision.num_requests * work / workers
        assert before + decision.num_requests * work <= after_victim + 1e-6
    assert decision.num_requests <= min(8, -(-queued // 2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"limits": StealLimits(steal_from=StealFrom.NONE)}, "stealing is off"),
        ({"max_requests": 0}, "no room"),
        ({"own": _stage(0, queued=1, tokens=10)}, "own queue first"),
        ({"limits": StealLimits(steal_from=StealFrom.SHORTER)}, "only from shorter stages"),
        ({"thief": replace(IDLE, num_running=200, context_tokens=400_000)}, "would not finish earlier"),
        ({"thief": replace(IDLE, pending_prefill_tokens=100_000)}, "would not finish earlier"),
    ],
)
def test_each_reason_not_to_steal_is_named(changes: dict[str, object], reason: str) -> None:
    """No steal, with the reason."""
    decision = _steal([_stage(1, queued=3, tokens=3000, running=5)], **changes)

    assert (decision.stage, decision.num_requests, decision.reason) == (None, 0, reason)


def test_nothing_waiting_is_not_an_error() -> None:
    """No siblings, empty queues, one's own stage in the list."""
    assert _steal([]).reason == "nothing waits elsewhere"
    assert _steal([_stage(1, queued=0, tokens=0)]).stage is None
    assert _steal([_stage(0, queued=9, tokens=900)]).stage is None


def test_a_long_request_does_not_come_to_a_busy_short_stage() -> None:
    """The same victim is robbed by an idle worker, but not by one with many short requests in its batch."""
    victim = _stage(1, queued=20, tokens=2_000_000, workers=2, running=8)
    busy = replace(IDLE, num_running=150, context_tokens=30_000)

    assert _steal([victim]).stage == 1
    refused = _steal([victim], thief=busy)
    assert refused.stage is None
    assert refused.reason == "would slow its own requests more"


def test_a_stage_without_workers_is_served_by_whoever_has_room() -> None:
    """Its drain time is endless."""
    orphan = _stage(1, queued=3, tokens=3000, workers=0)

    assert orphan.drain_ms is None
    decision = _steal([_stage(2, queued=50, tokens=50_000), orphan])
    assert (decision.stage, decision.reason) == (1, "no workers there")


# ---------------------------------------------------------------- running requests

VICTIM = WorkerLoad(worker_id="v", num_running=60, context_tokens=240_000, kv_capacity_tokens=445_000)
RUNNING = [
    RunningRequest(request_id=f"r{i}", length_tokens=4000, expected_remaining_tokens=800.0) for i in range(10)
]
FAST = MovePrice(bandwidth_bytes_per_s=50e9)


def _ask(load: WorkerLoad = IDLE, **changes: object) -> Ask | None:
    values: dict[str, object] = {
        "num_waiting_anywhere": 0,
        "moves_in_flight": 0,
        "last_move_ms": None,
        "now_ms": 10_000,
        "cost": COST,
    }
    return ask(load, **{**values, **changes})  # type: ignore[arg-type]  # test data by name


def _bid(
    victim: WorkerLoad = VICTIM, running: list[RunningRequest] = RUNNING, **changes: object
) -> tuple[Bid, ...]:
    request = _ask()
    assert request is not None
    values: dict[str, object] = {
        "moves_in_flight": 0,
        "last_move_ms": None,
        "now_ms": 10_000,
        "cost": COST,
        "price": FAST,
    }
    return bid(victim, running, request, **{**values, **changes})  # type: ignore[arg-type]  # test data by name


@pytest.mark.parametrize(
    "changes",
    [
        {"num_waiting_anywhere": 1},
        {"moves_in_flight": 3},
        {"last_move_ms": 9000},
        {"load": replace(IDLE, is_draining=True)},
        {"load": replace(IDLE, num_running=256)},
        {"load": replace(IDLE, kv_used_tokens=445_000)},
    ],
)
def test_nobody_asks_who_has_other_work_or_no_room(changes: dict[str, object]) -> None:
    """Waiting work first, at most three moves, a cool-down, room."""
    assert _ask() is not None
    assert _ask(**changes) is None


def test_an_overloaded_victim_offers_at_most_three() -> None:
    """Each offer gains more than it costs."""
    offers = _bid()

    assert len(offers) == 3
    assert all(o.benefit_ms > o.cost_ms for o in offers)
    assert [o.request_id for o in offers] == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"last_move_ms": 9500},
        {"moves_in_flight": 3},
        {"victim": replace(VICTIM, worker_id="t")},
        {"victim": replace(VICTIM, num_running=2, context_tokens=2000)},
        {"victim": replace(VICTIM, num_running=1)},
        {"running": [replace(r, came_from="t") for r in RUNNING]},
        {"running": [replace(r, length_tokens=450_000) for r in RUNNING]},
        {"running": [replace(r, expected_remaining_tokens=0.0) for r in RUNNING]},
        {"price": MovePrice(bandwidth_bytes_per_s=1e6)},
    ],
)
def test_a_victim_offers_nothing_when_it_may_not_or_need_not(changes: dict[str, object]) -> None:
    """Cool-down, enough moves, itself, no overload, the way back, too large, too dear."""
    assert _bid(**changes) == ()


def test_an_offer_takes_room_for_its_kv_cache_from_those_after_it() -> None:
    """Equal requests: the first two have room, the third one is to be prefilled again, and then stays."""
    room_bytes = 2 * 4000 * FAST.kv_bytes_per_token
    offers = _bid(price=replace(FAST, room_bytes=room_bytes))
    again = _bid(price=MovePrice())

    assert offers[:2] == _bid()[:2]
    assert [offer.cost_ms for offer in offers[2:]] == [offer.cost_ms for offer in again[:1]]


BIDS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 8), st.integers(1, 400), st.floats(1, 100)),
    max_size=25,
)


@given(BIDS, st.dictionaries(st.sampled_from(["w0", "w1", "w2", "w3"]), st.integers(0, 3)))
def test_matching_invents_and_loses_nothing(rows, in_flight: dict[str, int]) -> None:
    """Each request moves once, from its bidder to an asker with room; nobody moves more than three at once."""
    asks = [
        Ask(worker_id=f"w{i}", room_tokens=500, num_slots=3, num_running=0, context_tokens=0) for i in range(3)
    ]
    bids = [
        Bid(
            victim_id=f"w{v}",
            thief_id=f"w{t}",
            request_id=f"r{r}",
            length_tokens=n,
            benefit_ms=gain,
            cost_ms=0.5,
        )
        for v, t, r, n, gain in rows
    ]

    transfers = match(asks, bids, moves_in_flight=in_flight)

    offered = {(b.victim_id, b.thief_id, b.request_id, b.length_tokens) for b in bids}
    assert {(t.source_id, t.target_id, t.request_id, t.length_tokens) for t in transfers} <= offered
    assert len({t.request_id for t in transfers}) == len(transfers)
    for i in range(4):
        name = f"w{i}"
        own = [t for t in transfers if name in (t.source_id, t.target_id)]
        assert len(own) + in_flight.get(name, 0) <= max(3, in_flight.get(name, 0))
        assert sum(t.length_tokens for t in own if t.target_id == name) <= 500
        assert all(t.source_id != t.target_id for t in own)
    assert match(asks, list(reversed(bids)), moves_in_flight=in_flight) == transfers or len(
        {(b.request_id, b.thief_id, b.benefit_ms) for b in bids}
    ) < len(bids)
    assert match([], bids, moves_in_flight={}) == ()


@given(st.lists(st.integers(500, 8000), min_size=8, max_size=40))
def test_moving_running_requests_reaches_a_fixed_point(lengths: list[int]) -> None:
    """Two workers balance by repeated asks and bids, without a request going back, and stop."""
    held: dict[str, list[RunningRequest]] = {
        "v": [
            RunningRequest(request_id=f"r{i:02d}", length_tokens=n, expected_remaining_tokens=500.0)
            for i, n in enumerate(lengths)
        ],
        "t": [],
    }

    def load(name: str) -> WorkerLoad:
        total = sum(r.length_tokens for r in held[name])
        return replace(
            IDLE, worker_id=name, num_running=len(held[name]), context_tokens=total, kv_used_tokens=total
        )

    seen = set()
    for _ in range(len(lengths) + 2):
        moved = False
        for thief, victim in (("t", "v"), ("v", "t")):
            request = _ask(load(thief))
            if request is None:
                continue
            offers = bid(
                load(victim),
                held[victim],
                request,
                moves_in_flight=0,
                last_move_ms=None,
                now_ms=0,
                cost=COST,
                price=FAST,
            )
            for transfer in match([request], offers, moves_in_flight={}):
                assert transfer.request_id not in seen
                seen.add(transfer.request_id)
                item = next(r for r in held[victim] if r.request_id == transfer.request_id)
                held[victim].remove(item)
                held[thief].append(replace(item, came_from=victim))
                moved = True
        if not moved:
            break
    else:
        raise AssertionError("no fixed point")
    assert sorted(r.request_id for part in held.values() for r in part) == [
        f"r{i:02d}" for i in range(len(lengths))
    ]

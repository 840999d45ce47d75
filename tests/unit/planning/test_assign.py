"""Workers to stages with the fewest moves."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.planning.assign import assign, scale_counts


def _plan(counts: list[int], *, ids: bool = True) -> Plan:
    names = (f"w{i:02d}" for i in itertools.count())
    stages = []
    for i, n in enumerate(counts):
        workers = tuple(next(names) for _ in range(n)) if ids else ()
        high = 1000 * 4**i if i + 1 < len(counts) else None
        low = 1000 * 4 ** (i - 1) if i else 0
        stages.append(StagePlan(low_tokens=low, high_tokens=high, num_workers=n, worker_ids=workers))
    return Plan(version=1, stages=tuple(stages))


def _loads(n: int) -> list[WorkerLoad]:
    return [WorkerLoad(worker_id=f"w{i:02d}", context_tokens=100 * i) for i in range(n)]


@given(st.integers(1, 4).flatmap(lambda k: st.tuples(*[st.lists(st.integers(1, 4), min_size=k, max_size=k)] * 2)))
def test_with_the_same_ranges_moves_are_the_fewest_possible(counts) -> None:
    """Brute force over all assignments finds none with fewer moves; everybody has one place."""
    old, wanted = counts
    total = sum(old)
    current = _plan(old)
    target = scale_counts(wanted, total)
    stages = [
        StagePlan(low_tokens=s.low_tokens, high_tokens=s.high_tokens, num_workers=n)
        for s, n in zip(current.stages, target, strict=True)
    ]

    found = assign(stages, _loads(total), current=current)

    assert sorted(i for s in found.stages for i in s.worker_ids) == sorted(w.worker_id for w in _loads(total))
    assert [s.num_workers for s in found.stages] == target == [len(s.worker_ids) for s in found.stages]
    fewest = total - sum(min(a, b) for a, b in zip(old, target, strict=True))
    assert len(found.moved) == fewest
    for stage, before in zip(found.stages, current.stages, strict=True):
        assert set(found.moved).isdisjoint(set(stage.worker_ids) & set(before.worker_ids))


def test_the_same_plan_moves_nobody() -> None:
    """An assignment is a fixed point of itself."""
    current = _plan([2, 3, 1])

    found = assign(current.stages, _loads(6), current=current)

    assert found.moved == ()
    assert found.stages == current.stages


def test_the_least_loaded_worker_is_the_one_that_moves() -> None:
    """Of three workers of a stage that shrinks to two, the one with the least context goes."""
    current = _plan([3, 1])
    stages = [
        StagePlan(low_tokens=0, high_tokens=1000, num_workers=2),
        StagePlan(low_tokens=1000, high_tokens=None, num_workers=2),
    ]

    assert assign(stages, _loads(4), current=current).moved == ("w00",)


def test_a_worker_stays_with_its_lengths_when_a_stage_is_inserted() -> None:
    """Long workers stay long although the number of their stage changes."""
    current = _plan([2, 2])
    stages = [
        StagePlan(low_tokens=0, high_tokens=900, num_workers=2),
        StagePlan(low_tokens=900, high_tokens=2000, num_workers=1),
        StagePlan(low_tokens=2000, high_tokens=None, num_workers=1),
    ]

    found = assign(stages, _loads(4), current=current)

    assert found.stages[0].worker_ids == ("w00", "w01")
    assert found.stages[2].worker_ids == ("w03",)
    assert found.moved == ("w02",)


def test_newcomers_fill_what_is_open_and_do_not_count_as_moved() -> None:
    """A worker that the old plan does not know takes the place that is left."""
    current = _plan([1, 1])
    stages = [
        StagePlan(low_tokens=0, high_tokens=1000, num_workers=1),
        StagePlan(low_tokens=1000, high_tokens=None, num_workers=2),
    ]

    found = assign(stages, _loads(3), current=current)

    assert found.stages[1].worker_ids == ("w01", "w02")
    assert found.moved == ()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 30))
def test_counts_scaled_to_a_total_add_up_to_it(counts: list[int], total: int) -> None:
    """Every stage keeps one worker while there are enough; the right counts are left alone."""
    scaled = scale_counts(counts, total)

    assert sum(scaled) == total
    assert min(scaled) >= (1 if total >= len(counts) else 0)
    if min(counts) >= 1 and sum(counts) == total:
        assert scaled == counts
    assert scale_counts([], 3) == []


def test_too_few_workers_serve_the_stages_that_were_to_have_most() -> None:
    """Two workers for three stages: the two largest, ties to the lower."""
    assert scale_counts([1, 3, 3], 2) == [0, 1, 1]
    assert scale_counts([2, 2, 2], 1) == [1, 0, 0]

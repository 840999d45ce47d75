"""One worker runs empty for a suspect; the next only when that one has had its time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.models import WorkerLoad
from l4queue.policy.solo import SoloLimits, turn_of

LIMITS = SoloLimits(patience_s=5.0, empty_s=10.0, step_s=15.0)
LOAD = st.builds(
    WorkerLoad,
    worker_id=st.sampled_from("abcdef"),
    num_running=st.integers(0, 4),
    num_waiting_in_engine=st.integers(0, 1),
    context_tokens=st.integers(0, 3),
    is_draining=st.booleans(),
    is_emptying=st.booleans(),
    can_empty=st.just(True),
)
FLEET = st.lists(LOAD, unique_by=lambda w: w.worker_id, min_size=1, max_size=6)


def _turns(fleet: list[WorkerLoad], waited_s: float) -> set[str]:
    """Who would run empty, if all knew the same."""
    return {w.worker_id for w in fleet if turn_of(w, fleet, waited_s=waited_s, limits=LIMITS).is_ours}


@given(fleet=FLEET, waited_s=st.floats(5.0, 19.9))
def test_exactly_one_runs_empty_first(fleet: list[WorkerLoad], waited_s: float) -> None:
    """If there is one that does not drain: who has begun, or has least to do."""
    able = [w for w in fleet if not w.is_draining]
    turns = _turns(fleet, waited_s)
    assert len(turns) == min(1, len(able))
    for name in turns:
        chosen = next(w for w in able if w.worker_id == name)
        if any(w.is_emptying for w in able):
            assert chosen.is_emptying
        else:
            assert chosen.num_running == min(w.num_running for w in able)


@given(fleet=FLEET, waited_s=st.floats(0.0, 4.9))
def test_before_that_only_who_has_begun_goes_on(fleet: list[WorkerLoad], waited_s: float) -> None:
    """A worker may become idle by itself."""
    begun = {w.worker_id for w in fleet if w.is_emptying and not w.is_draining}
    turns = _turns(fleet, waited_s)
    assert turns <= begun
    assert len(turns) == min(1, len(begun))


@given(fleet=FLEET, waited_s=st.floats(0.0, 200.0), more_s=st.floats(0.0, 50.0))
def test_turns_are_added_and_never_taken_away_by_time(
    fleet: list[WorkerLoad], waited_s: float, more_s: float
) -> None:
    """One more after each step; in the end everybody who may."""
    turns, able = _turns(fleet, waited_s), {w.worker_id for w in fleet if not w.is_draining}
    assert turns <= _turns(fleet, waited_s + more_s) <= able
    assert len(turns) <= max(1, int((waited_s - 5.0) / 15.0) + 1)
    assert _turns(fleet, 5.0 + 15.0 * len(fleet)) == able


@given(fleet=FLEET, waited_s=st.floats(5.0, 19.9))
def test_an_older_release_has_no_turn(fleet: list[WorkerLoad], waited_s: float) -> None:
    """It does not tell that it runs empty, and may not: nobody waits for it."""
    busy = WorkerLoad(worker_id="z", num_running=9, can_empty=True)
    old = [replace(w, can_empty=False, is_emptying=False) for w in fleet]
    assert turn_of(busy, old, waited_s=waited_s, limits=LIMITS).is_ours


@pytest.mark.parametrize("field", ["is_draining", "is_emptying"])
def test_who_takes_no_work_is_not_open(field: str) -> None:
    """What movers, routers and loads go by."""
    assert WorkerLoad(worker_id="w").is_open
    assert not replace(WorkerLoad(worker_id="w"), **{field: True}).is_open  # type: ignore[arg-type]

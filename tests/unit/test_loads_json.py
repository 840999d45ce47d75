"""What a worker publishes is read by workers of the release before and of the one after."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from l4queue.models import WorkerLoad
from l4queue.protocol.parsing import load_from_json, load_to_json

LOADS = st.builds(WorkerLoad, worker_id=st.text(), num_running=st.integers(0, 9), is_emptying=st.booleans())
# The first release; it fails at any other name in `load`.
FIRST = {
    "worker_id", "incarnation", "stage", "num_running", "num_waiting_in_engine", "context_tokens",
    "pending_prefill_tokens", "kv_used_tokens", "kv_capacity_tokens", "max_running", "step_ms", "tokens_per_s",
    "is_draining", "engine", "num_finished", "num_preemptions",
}  # fmt: skip


@given(load=LOADS)
def test_a_load_is_read_as_it_was_told(load: WorkerLoad) -> None:
    assert load_from_json(load_to_json(load)) == load


@given(load=LOADS)
def test_new_facts_are_no_trouble_for_the_first_release(load: WorkerLoad) -> None:
    """They are beside `load`, where it does not look."""
    told = load_to_json(load)
    assert set(told["load"]) == FIRST
    assert set(told["more"]) == {field.name for field in fields(WorkerLoad)} - FIRST


@given(load=LOADS)
def test_facts_of_other_releases_are_left_out(load: WorkerLoad) -> None:
    """Of a later one those that are unknown here; of the first one those that it lacks have their defaults."""
    told = load_to_json(load)
    old = load_from_json({"load": told["load"]})
    assert (old.num_running, old.is_emptying, old.can_empty) == (load.num_running, False, False)
    later = {
        "load": {**told["load"], "colour": "red"},
        "more": {**told["more"], "mood": 3},
        "extra": [],
    }
    assert load_from_json(later) == load

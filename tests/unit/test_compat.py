"""Values of other releases: unknown fields are ignored, missing ones have defaults, wrong ones a typed error."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from l4queue.compat import FORMAT, MAX_NUMBER, object_of, value_of
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.errors import UnreadableValue
from l4queue.models import RequestBody, RequestState, WorkerLoad
from l4queue.policy.steal import Ask
from l4queue.protocol import parsing as views
from l4queue.protocol.records import OutputEntry, RequestRecord

LOAD = WorkerLoad(worker_id="w", stage=1, num_running=3, step_ms=1.5)
COST = StepCost(alpha_ms=1.0, beta_ms=0.1, gamma_ms=0.0, pi_ms=0.01, psi_ms=0.0)
ASK = Ask(worker_id="w", room_tokens=10, num_slots=1, num_running=0, context_tokens=0)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "value", [LOAD, COST, MovePrice(bandwidth_bytes_per_s=1e9), ASK], ids=lambda v: type(v).__name__
)
@settings(deadline=None)
@given(more=st.dictionaries(st.text(max_size=5).map("later_".__add__), json_values, max_size=4))
def test_fields_of_a_newer_release_are_ignored(value: Any, more: dict[str, Any]) -> None:
    """Whatever they hold."""
    assert value_of(type(value), asdict(value) | more, what="value") == value


@settings(deadline=None)
@given(
    data=json_values
    | st.fixed_dictionaries(
        {"worker_id": st.text(max_size=5) | json_values},
        optional=dict.fromkeys(("num_running", "step_ms", "kv_budget_bytes", "models"), json_values),
    )
)
def test_anything_is_a_value_or_a_typed_error(data: Any) -> None:
    """And its numbers can be reckoned with."""
    try:
        load = value_of(WorkerLoad, data, what="load")
    except UnreadableValue:
        return
    for field in fields(load):
        number = getattr(load, field.name)
        assert number is None or isinstance(number, str | tuple) or 0 <= number <= MAX_NUMBER


def test_missing_fields_have_their_defaults() -> None:
    """An older release does not tell them."""
    assert value_of(WorkerLoad, {"worker_id": "w"}, what="load") == WorkerLoad(worker_id="w")
    with pytest.raises(UnreadableValue, match="worker_id"):
        value_of(WorkerLoad, {}, what="load")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "not JSON"),
        (b"\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        (f'{{"v": {FORMAT + 1}}}', "version"),
        ('{"v": "1"}', "version"),
        ('{"v": true}', "version"),
    ],
)
def test_an_object_of_another_format_is_not_believed(text: str | bytes, message: str) -> None:
    """What is wrong is said."""
    with pytest.raises(UnreadableValue, match=message):
        object_of(text, what="it")


def test_a_higher_version_alone_is_refused() -> None:
    """None means the first."""
    assert object_of('{"a": 1}', what="it") == {"a": 1}
    assert object_of(f'{{"a": 1, "v": {FORMAT}}}', what="it")["a"] == 1


def _worker(told: dict[str, Any]) -> views.WorkerView | None:
    return views.worker("w:1", 5, "{n}:w:w:1", [b"w", json.dumps(told).encode(), b"1"])


def test_a_worker_of_a_newer_release_is_known_by_what_both_know() -> None:
    """`more` holds what came later; of it, too, only what this release knows counts."""
    told = {
        "load": asdict(LOAD) | {"later": [1]},
        "cost": asdict(COST) | {"later": 1},
        "price": asdict(MovePrice()),
    }
    view = _worker(told | {"v": 1, "more": {"is_draining": True, "later": 3}, "later": {}})

    assert view is not None
    assert view.load == LOAD  # `load` wins over `more`
    assert (view.cost, view.price) == (COST, MovePrice())
    del told["load"]["is_draining"]
    assert _worker(told | {"more": {"is_draining": True}}).load.is_draining  # type: ignore[union-attr]


def test_the_room_for_kv_caches_is_told_beside_the_price_and_read_with_it() -> None:
    """A worker of the first release would not read a price that has it."""
    price, load = MovePrice(bandwidth_bytes_per_s=1e9, room_bytes=5), replace(LOAD, kv_budget_bytes=5)

    view = _worker({**views.load_to_json(load), "price": views.price_to_json(price)})

    assert view is not None
    assert (view.load, view.price) == (load, price)


@pytest.mark.parametrize("part", ["cost", "price"])
@pytest.mark.parametrize(
    "value", [7, [], {"alpha_ms": "x", "fixed_ms": "x"}, {"bandwidth_bytes_per_s": 0}, {"kv_bytes_per_token": -1}]
)
def test_a_worker_whose_cost_or_price_cannot_be_read_still_counts(part: str, value: Any) -> None:
    """Without them, as a worker of a release that had none."""
    view = _worker({"load": asdict(LOAD), part: value})
    assert view is not None
    assert view.load == LOAD
    assert getattr(view, part) is None


def test_a_stored_body_is_read_more_freely_than_it_is_accepted() -> None:
    """What a newer client knew is ignored, at every depth; what is wrong is still wrong."""
    outputs = {"choice": ["a"], "later": 1}
    body = json.dumps({"params": {"max_tokens": 3, "later": 1, "structured_outputs": outputs}, "later": 1})
    assert RequestBody.stored(body).params.max_tokens == 3
    with pytest.raises(ValidationError):
        RequestBody.model_validate_json(body)
    with pytest.raises(ValidationError):
        RequestBody.stored('{"params": {"max_tokens": "3"}}')


def test_a_record_with_broken_fields_is_read_without_them() -> None:
    """One whose state only a newer release knows cannot be told of."""
    row = dict.fromkeys(RequestRecord.field_names()) | {
        "state": b"queued",
        "offset": b"abc",
        "epoch": b"2",
    }
    record = RequestRecord.parse("a", list(row.values()))
    assert record is not None
    assert (record.state, record.offset, record.epoch) == (RequestState.QUEUED, 0, 2)
    with pytest.raises(ValueError, match="later"):
        RequestRecord.parse("a", list((row | {"state": b"later"}).values()))


@pytest.mark.parametrize(
    ("entry_id", "values"),
    [
        (b"3-0", {b"x": b"y"}),
        (b"3-0", {b"t": b"abc"}),
        (b"3-7", {b"t": b"\0\0\0\0", b"x": b"y"}),
        (b"0-0", {b"t": b"\0\0\0\0", b"x": b"y"}),
        (b"3-0", {b"e": b"done"}),
        (b"3-1", {b"e": b"weird"}),
        (b"3-1", {b"t": b"\0\0\0\0"}),
        (b"3-0", {b"t": b"\0\0\0\0", b"x": b"\xff"}),
        (b"3-0", {b"t": b"\0\0\0\0", b"l": b"abc"}),
    ],
)
def test_an_output_entry_that_no_worker_writes_is_refused(entry_id: bytes, values: dict[bytes, bytes]) -> None:
    """By its id, its fields or their bytes."""
    with pytest.raises(ValueError):
        OutputEntry.parse(entry_id, values)


@settings(deadline=None)
@given(rows=st.dictionaries(st.binary(max_size=6), st.binary(max_size=6), max_size=5))
def test_figures_are_numbers_whatever_the_hash_holds(rows: dict[bytes, bytes]) -> None:
    """Others are left out."""
    for value in views.figures("{n}:counts", rows).values():
        assert abs(float(value)) <= MAX_NUMBER


@settings(deadline=None)
@given(text=st.binary(max_size=40))
def test_ledger_lines_are_objects_with_a_time_and_a_word(text: bytes) -> None:
    """Others are left out, and a good line among them is kept."""
    good = b'{"what":"later","at_ms":3}'
    lines = views.ledger_lines("{n}:req:a", text + b"\n" + good + b"\n")
    assert good.decode() in lines
    for line in lines:
        assert isinstance(json.loads(line)["what"], str)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signed:
    values: dict[str, float]


def test_numbers_are_checked_at_every_depth() -> None:
    """Negative ones only where they may be."""
    assert value_of(_Signed, {"values": {"a": -1.0}}, what="it", signed=True).values == {"a": -1.0}
    for bad in (-1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(UnreadableValue):
            value_of(_Signed, {"values": {"a": bad}}, what="it")

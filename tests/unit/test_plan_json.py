"""Plans as JSON: a round trip is exact, and nothing half right is accepted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.errors import ConfigError
from l4queue.models import Plan, StagePlan
from l4queue.plan_json import NewerPlan, plan_from_json, plan_to_json


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Valid plans of one to five stages."""
    edges = [0, *sorted(draw(st.sets(st.integers(1, 10**6), max_size=4)))]
    stages = []
    for i, low in enumerate(edges):
        ids = tuple(f"w{i}-{n}" for n in range(draw(st.integers(0, 3))))
        high = edges[i + 1] if i + 1 < len(edges) else None
        stages.append(StagePlan(low_tokens=low, high_tokens=high, num_workers=len(ids), worker_ids=ids))
    finite = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    return Plan(
        version=draw(st.integers(0, 10**9)),
        stages=tuple(stages),
        reason=draw(st.text(max_size=20)),
        created_ms=draw(st.integers(0, 2**50)),
        objective=draw(finite),
        objective_one_stage=draw(finite),
        prefix_affinity=len(stages) == 1 and draw(st.booleans()),
        details=draw(st.dictionaries(st.text(max_size=5), st.integers() | st.none(), max_size=3)),
    )


@given(plans())
def test_what_is_written_is_read_back(plan: Plan) -> None:
    """Equal plans, equal bytes."""
    text = plan_to_json(plan)

    assert plan_from_json(text) == plan
    assert plan_from_json(text.encode()) == plan
    assert plan_to_json(plan_from_json(text)) == text


@given(
    st.binary(max_size=60)
    | st.text(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["version", "stages", "low_tokens", "high_tokens", "num_workers", "worker_ids", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(json.dumps)
)
def test_anything_else_is_a_config_error(text: str | bytes) -> None:
    """Whatever the bytes, the answer is a plan or a ConfigError."""
    try:
        plan = plan_from_json(text)
    except ConfigError:
        return
    assert plan.stages[-1].high_tokens is None


GOOD = {
    "version": 1,
    "stages": [
        {"low_tokens": 0, "high_tokens": 512, "num_workers": 1, "worker_ids": ["a"]},
        {"low_tokens": 512, "high_tokens": None, "num_workers": 1, "worker_ids": ["b"]},
    ],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["stages"][1].update(low_tokens=600), "expected 512"),
        (lambda p: p["stages"][0].update(low_tokens=1), "expected 0"),
        (lambda p: p["stages"][1].update(high_tokens=9000), "open-ended"),
        (lambda p: p["stages"][0].update(high_tokens=None), "open-ended"),
        (lambda p: p["stages"][0].update(high_tokens=0), "not above"),
        (lambda p: p["stages"][0].update(num_workers=-1), "num_workers"),
        (lambda p: p["stages"][0].update(num_workers=True), "num_workers"),
        (lambda p: p["stages"][0].update(low_tokens=0.5), "low_tokens"),
        (lambda p: p["stages"][0].update(worker_ids=["b"]), "twice"),
        (lambda p: p["stages"][0].update(worker_ids="ab"), "worker_ids"),
        (lambda p: p.update(v="one"), "v must be"),
        (lambda p: p.update(version=2**60), "version"),
        (lambda p: p.update(version=None), "version"),
        (lambda p: p.update(objective="low"), "objective"),
        (lambda p: p.update(reason=3), "reason"),
        (lambda p: p.update(details=[]), "details"),
        (lambda p: p.update(version=2**53 + 1), "version"),
        (lambda p: p.update(objective=10**400), "objective must be a finite"),
        (lambda p: p.update(reason="\ud800"), "surrogate"),
        (lambda p: p.update(routing=[]), "routing"),
        (lambda p: p.update(routing="x" * 10_000), "routing"),
        (lambda p: p.update(stages=[]), "no stages"),
        (lambda p: p.update(stages=[1]), "must be an object"),
    ],
)
def test_a_broken_plan_is_refused_with_what_is_wrong(change, message: str) -> None:
    """Each error names the field or the rule."""
    data = json.loads(json.dumps(GOOD))
    change(data)

    with pytest.raises(ConfigError, match=message):
        plan_from_json(json.dumps(data))


def test_fields_of_another_release_are_ignored() -> None:
    """In the plan and in its stages; nothing else changes."""
    data = json.loads(json.dumps(GOOD))
    data.update(extra=1, v=1)
    data["stages"][0].update(colour="red")

    assert plan_from_json(json.dumps(data)) == plan_from_json(json.dumps(GOOD))


@pytest.mark.parametrize("change", [{"v": 2}, {"routing": "by-moonlight"}])
def test_a_plan_that_only_a_newer_release_understands_says_so(change) -> None:
    """It is not broken: whoever published it goes by it."""
    with pytest.raises(NewerPlan):
        plan_from_json(json.dumps(GOOD | change))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"version":1e999}', '{"version":1,"version":2}', b"\xff",
     "\ud800", b"\xed\xa0\x80", '{"details":' + "[" * 70 + "]" * 70 + "}"],
)  # fmt: skip
def test_what_python_reads_in_four_ways_is_one_error(text: str | bytes) -> None:
    """In one line of bounded length."""
    with pytest.raises(ConfigError, match="a plan must be JSON") as caught:
        plan_from_json(text)
    assert len(str(caught.value)) < 300


def test_numbers_that_are_not_finite_are_refused_both_ways() -> None:
    """NaN and infinity neither leave nor enter."""
    with pytest.raises(ConfigError, match="finite"):
        plan_from_json('{"version":1,"objective":NaN,"stages":[]}')
    one = Plan.one_stage(version=1)
    with pytest.raises(ConfigError, match="JSON"):
        plan_to_json(Plan(version=1, stages=one.stages, objective=float("inf")))
    with pytest.raises(ConfigError, match="begins at 5"):
        plan_to_json(Plan(version=1, stages=(StagePlan(low_tokens=5, high_tokens=None, num_workers=0),)))
    with pytest.raises(ConfigError, match="workers"):
        plan_to_json(Plan(version=1, stages=(StagePlan(low_tokens=0, high_tokens=None, num_workers=-1),)))


def test_prefix_affinity_is_read_by_releases_that_do_not_know_it() -> None:
    """The first one refuses a plan with another field, and ignores what it does not know of the details."""
    plan = replace(Plan.one_stage(version=3), prefix_affinity=True, details={"a": 1})
    told = json.loads(plan_to_json(plan))

    assert "prefix_affinity" not in told
    assert told["details"] == {"a": 1, "prefix_affinity": True}
    assert json.loads(plan_to_json(replace(plan, prefix_affinity=False)))["details"] == {"a": 1}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"details": {"prefix_affinity": 1}}, "details.prefix_affinity must be true or false"),
        ({"details": {"prefix_affinity": True}}, "there is one stage, not 2"),
    ],
)
def test_prefix_affinity_is_a_truth_and_has_one_stage(change: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        plan_from_json(json.dumps(GOOD | change))

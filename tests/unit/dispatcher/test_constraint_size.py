"""The bound of constraints where vLLM is not installed beside the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.constraints.size import MAX_SIZE, constraint_size
from l4queue.sampling import StructuredOutputs


def size(**kind: Any) -> int:
    return constraint_size(StructuredOutputs.model_validate(kind))


def of(num_properties: int, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": schema for i in range(num_properties)}}


@pytest.mark.parametrize(
    "kind",
    [
        {"json": of(2100, {"type": "string"})},
        {"json": of(12, {"type": "string", "pattern": "^(([a-z]{0,200}){0,200}-){0,200}$"})},
        {"json": {"type": "array", "items": {"type": "integer"}, "maxItems": 100_000}},
        {"json": {"type": "array", "maxItems": 400, "items": {"type": "array", "maxItems": 400, "items": {}}}},
        {"choice": ["x" * 1000] * 1000},
        {"regex": "((a{0,100}){0,100}){0,100}"},
        {"regex": "((((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9}){9})"},
        {"regex": "(a|b){1000000}"},
        {"grammar": "root ::= ((a{0,100}){0,100}){0,100}"},
        {"structural_tag": {"format": {"type": "regex", "pattern": "(a|b){1000000}"}}},
        {"structural_tag": {"format": {"type": "grammar", "grammar": "root ::= [ab]{1000000}"}}},
        {"structural_tag": {"format": {"content": {"json_schema": of(2100, {"type": "string"})}}}},
        {
            "structural_tag": {
                "format": {"type": "repeat", "min": 0, "max": 10**9, "content": {"type": "any_text"}}
            }
        },
    ],
)
def test_what_takes_long_is_too_large(kind: dict[str, Any]) -> None:
    """The constraints that take an engine many seconds."""
    assert size(**kind) > MAX_SIZE


@pytest.mark.parametrize(
    "kind",
    [
        {"json": of(100, {"type": "string", "maxLength": 100_000})},
        {"json": of(20, {"type": "array", "maxItems": 50, "items": of(5, {"type": "number"})})},
        {"json": {"type": "string", "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z$"}},
        {"choice": [f"label {i}" for i in range(1000)]},
        {"regex": r"[\]{9}]{3}\{9999999\}"},
        {"regex": "{,}a{}b{"},
        {"grammar": 'root ::= [0-9]{8} ("-" [0-9]{4}){3} "-" [0-9]{12}'},
        {"structural_tag": {"format": {"tags": [{"begin": "<call>", "content": of(100, {}), "end": "</call>"}]}}},
    ],
)
def test_usual_constraints_are_not(kind: dict[str, Any]) -> None:
    """Braces that repeat nothing count as what they are."""
    assert size(**kind) < MAX_SIZE / 2


@pytest.mark.parametrize(
    ("regex", "expected"), [("a", 1), ("ab", 2), ("a{5}", 5), ("(ab){2,3}c", 7), (r"[a\]]{4}", 4)]
)
def test_a_repetition_counts_as_often_as_it_may_come(regex: str, expected: int) -> None:
    """Beside one for the whole."""
    assert size(regex=regex) == expected + 1


@settings(deadline=None)
@given(regex=st.text(min_size=1, alphabet="ab(){}[]\\,0123456789*+?|", max_size=60))
def test_any_text_has_a_bounded_size(regex: str) -> None:
    """It need not be an expression."""
    assert 1 <= size(regex=regex) <= MAX_SIZE + 1

"""JSON from outside: read unchanged, or one kind of error."""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from l4queue.strict_json import MAX_NESTING, JsonError, canonical_json, check_json, parse_json, read_json
from tests.property.requests import DEEP, JSON, ODD, nested, shuffled

SANE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(SANE)
def test_what_json_holds_is_read_as_it_was_written(value: Any) -> None:
    """As text and as bytes, escaped or not, with a byte-order mark or without."""
    check_json(value)
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert read_json(text) == value
        assert read_json(text.encode()) == value
        assert read_json(text.encode("utf-8-sig")) == value
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(shuffled(value)) == canonical_json(value)


@settings(deadline=None)
@given(JSON | ODD | DEEP)
@example(HTTPStatus.OK)
@example([HTTPStatus.OK, True])
def test_a_value_passes_where_its_readers_get_it_unchanged(value: Any) -> None:
    """Whatever passes survives; whatever does not is a JsonError."""
    try:
        check_json(value, max_bytes=100_000)
    except JsonError:
        return
    assert read_json(json.dumps(value)) == value
    assert len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()) <= 100_000


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(st.characters(exclude_categories=()), max_size=40))
def test_whatever_is_read_there_is_one_error(data: str | bytes) -> None:
    """Bytes of any kind."""
    try:
        value = read_json(data)
    except JsonError:
        return
    check_json(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "deeper than 64"),
        ("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), "deeper than 64"),
        ("9" * 5000, "too large"),
        ("1e999", "too large"),
        ("9" * 400 + ".5", "too large"),
        ("NaN", "not finite"),
        ("-Infinity", "not finite"),
        (str(2**64), "64 bits"),
        (str(-(2**63) - 1), "64 bits"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ('"\\udbff"', "surrogate"),
        ('{"\\uDC00": 1}', "surrogate"),
        ('"\ud800"', "surrogate"),
        (b'"\xed\xa0\x80"', "UTF-8 at byte 2"),
        ("{", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_what_cannot_be_is_told(text: str | bytes, words: str) -> None:
    """In words for its author."""
    with pytest.raises(JsonError, match=words):
        read_json(text)


def test_bounds_are_reached_and_not_passed() -> None:
    """Levels, bytes of the document, bytes of the value."""
    deepest = nested(MAX_NESTING)
    assert read_json(json.dumps(deepest)) == deepest
    with pytest.raises(JsonError, match="deeper"):
        check_json([deepest])
    for data in ("\u00fc" * 5, ("\u00fc" * 5).encode(), "x" * 13):
        with pytest.raises(JsonError, match="at most 9 are read"):
            parse_json(data, max_bytes=9)
    check_json(["\u00fc"], max_bytes=6)
    with pytest.raises(JsonError, match="6 bytes; at most 5"):
        check_json(["\u00fc"], max_bytes=5)
    with pytest.raises(JsonError, match="more than 1000 bytes"):
        check_json([0] * 10**6, max_bytes=1000)


def test_a_parsed_document_leaves_its_numbers_to_its_reader() -> None:
    """Those beyond what Python reads are infinite; the rest of the document stands."""
    assert parse_json("[" + "9" * 5000 + ", 7, 1e999]") == [math.inf, 7, math.inf]
    assert parse_json(b'{"id": "a", "n": ' + b"9" * 4000 + b"}")["id"] == "a"

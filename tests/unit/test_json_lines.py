"""JSON lines that no reader breaks in two."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.json_lines import json_line

TEXTS = st.text(
    alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
)


@settings(deadline=None)
@given(value=st.recursive(TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)))
def test_any_value_is_one_line_and_the_same_again(value: Any) -> None:
    """By `str.splitlines`, which knows the most ends of lines; keys too."""
    line = json_line(value)
    assert line.splitlines() == [line]
    assert json.loads(line) == value


def test_other_characters_stand_for_themselves() -> None:
    """Answers stay readable."""
    assert json_line({"ü": "漢😀\u2028"}) == '{"ü": "漢😀\\u2028"}'

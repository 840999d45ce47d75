"""Bodies of batches: windows, and the field at fault."""

from __future__ import annotations

import pytest

from gateway.batches.bodies import BatchBody, ExpiresAfter, FilePage, parsed, window_s
from l4queue.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "length_s"), [("24h", 86_400), ("1s", 1), ("90m", 5400), ("7d", 604_800), ("604800s", 604_800)]
)
def test_a_window_has_a_unit(text: str, length_s: int) -> None:
    assert window_s(text) == length_s


@pytest.mark.parametrize("text", ["", "24", "h", "0h", "-1h", "1.5h", "24H", "8d", "169h", "24h ", "٣h"])
def test_another_window_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        window_s(text)
    assert caught.value.field == "completion_window"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "input_file_id"),
        ({"input_file_id": 1}, "input_file_id"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "other", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_the_field_at_fault_is_named(given: dict[str, object], field: str) -> None:
    sound = {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "24h"}
    with pytest.raises(InvalidRequest) as caught:
        parsed(BatchBody, {**sound, **given} if given else {})
    assert caught.value.field == field


def test_numbers_of_forms_and_queries_are_texts() -> None:
    """As HTTP has them."""
    assert parsed(ExpiresAfter, {"anchor": "created_at", "seconds": "3600"}).seconds == 3600
    assert parsed(FilePage, {"limit": "3", "order": "asc"}).limit == 3
    with pytest.raises(InvalidRequest) as caught:
        parsed(FilePage, {"limit": "10001"})
    assert caught.value.field == "limit"

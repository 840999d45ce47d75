"""The first fault that pydantic finds, in words for users. Pure."""

from __future__ import annotations

import re
from typing import TypeAlias

from pydantic import ValidationError

__all__ = ("Place", "first_fault")

Place: TypeAlias = tuple[int | str, ...]
"""Names and positions that lead to a value."""
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "unknown parameter",
    "tuple_type": "must be a list",
}
_SUBJECT = re.compile(r"^\w+ should ")  # Input, String, Tuple, Dictionary, ...


def first_fault(error: ValidationError) -> tuple[Place, str]:
    """Where it is, and what is wrong there, without the value itself."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = tuple(part for part in first["loc"] if part != "[key]")
    told = _WORDS.get(first["type"]) or _SUBJECT.sub("must ", first["msg"].removeprefix("Value error, "))
    return place, told.replace(" after validation", "")

"""JSON that another process wrote, perhaps of another release.

Fields that this release does not know are ignored, missing ones have their defaults, wrong ones are a typed error.
What may mix, and what a version number means: docs/compatibility.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from l4queue.errors import UnreadableValue
from l4queue.validation import first_fault

__all__ = ("FORMAT", "MAX_NUMBER", "TOTALS", "object_of", "value_of")

T = TypeVar("T")

FORMAT = 1
"""The version that JSON values carry as `v`. A higher one says that a reader of this release would be misled."""
MAX_NUMBER = 2**53
"""Largest number that is believed: what a double holds exactly, and far more tokens or ms than there are."""
TOTALS = "worker-totals"
"""Celery event of our own by which a worker tells Flower how many of each type there were since it began, whether
they were sent or not; `run` names that start."""

_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def object_of(text: str | bytes, *, what: str) -> dict[str, Any]:
    """A JSON object of a format that this release knows; UnreadableValue says what is wrong with it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableValue(f"{what} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UnreadableValue(f"{what} is not a JSON object")
    version = found.get("v", FORMAT)
    if isinstance(version, bool) or not isinstance(version, int):
        raise UnreadableValue(f"{what} has a version that is no number: {version!r}")
    if version > FORMAT:
        raise UnreadableValue(f"{what} has version {version}; this release knows up to {FORMAT}")
    return found


def value_of(cls: type[T], data: object, *, what: str, signed: bool = False) -> T:
    """A dataclass of plain values from a JSON object. Its numbers are finite, and not negative unless `signed`."""
    if not isinstance(data, Mapping):
        raise UnreadableValue(f"{what} is not a JSON object")
    try:
        found: T = _adapter(cls).validate_json(json.dumps(data), strict=True)
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        raise UnreadableValue(f"{what}: {_first(error)}") from None
    low = -MAX_NUMBER if signed else 0
    for field in fields(cls):  # type: ignore[arg-type]  # T is a dataclass
        for number in _numbers(getattr(found, field.name)):
            if not low <= number <= MAX_NUMBER:  # nor is NaN
                raise UnreadableValue(f"{what}: {field.name} has {number!r:.40}")
    return found


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    place, told = first_fault(error)
    return f"{'.'.join(map(str, place))}: {told}"

"""Plain values of callers: numbers of numpy and its kin, arrays, sequences. Pure; imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ("plain_value", "plain_values")

_PLAIN = frozenset({type(None), bool, int, float, str, bytes, dict})


def plain_value(value: Any) -> Any:
    """A number as int or float; an array or a sequence as a tuple, its numbers too; anything else as it is.

    Numbers and arrays of other libraries are known by the protocols that they keep: `numbers`, `tolist`.
    """
    if type(value) in _PLAIN or isinstance(value, str | bytes):
        return value
    if isinstance(value, Real):
        return _plain_number(value)
    if not isinstance(value, list | tuple) and callable(getattr(value, "tolist", None)):
        value = value.tolist()  # numpy, array.array, pandas, torch
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        return value
    return tuple(value) if set(map(type, value)) <= _PLAIN else tuple(map(_plain_number, value))


def _plain_number(value: Any) -> Any:
    if type(value) in _PLAIN or not isinstance(value, Real):
        return value
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:
        return value


def plain_values(values: Any) -> Any:
    """The same for each value of a dictionary of fields."""
    return {name: plain_value(value) for name, value in values.items()} if isinstance(values, dict) else values

"""JSON from outside, within bounds: read, or refused with one kind of error. Pure.

Python's own reader takes more than JSON (NaN, keys that come twice, half surrogate pairs) and fails in four ways.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

__all__ = (
    "MAX_JSON_BYTES",
    "MAX_NESTING",
    "JsonError",
    "canonical_json",
    "check_json",
    "check_text",
    "is_unicode",
    "parse_json",
    "read_json",
    "values_of",
)

MAX_NESTING = 64
"""Most levels of lists and objects in one another; vLLM's bound for schemas."""
MAX_JSON_BYTES = 64 * 2**20
"""Largest document that is read, bytes."""
_LEAST, _MOST = -(2**63), 2**64 - 1  # 64 bits, signed or unsigned: what other readers of JSON hold
_PLAIN = (str, bool, int, float, type(None))
_SURROGATE = re.compile("[\ud800-\udfff]")
_TO_LOOK_AT = re.compile(r"\\u[dD][89a-fA-F]|\d{19}|[eE]\+?\d\d|N|Infinity")


class JsonError(ValueError):
    """A fault of a document or a value, in words for its author."""


def read_json(data: str | bytes, *, max_bytes: int = MAX_JSON_BYTES, any_integers: bool = False) -> Any:
    """A document whose every value can be written, sent and read again. JsonError says what is wrong.

    `any_integers`: also those of more than 64 bits, which Python alone reads.
    """
    value = parse_json(data, max_bytes=max_bytes)
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    if _TO_LOOK_AT.search(text):
        check_json(value, any_integers=any_integers)
    return value


def parse_json(data: str | bytes, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """A document with each key once and bounded nesting; its numbers and texts are for the caller to check.

    A number beyond what Python reads is an infinity. JsonError for all that cannot be read.
    """
    try:
        size_bytes = len(data) if isinstance(data, bytes) or len(data) > max_bytes else len(data.encode())
        if size_bytes > max_bytes:
            raise JsonError(f"has {size_bytes} bytes; at most {max_bytes} are read")
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"not valid UTF-8 at byte {error.start + 1}") from None
    except UnicodeEncodeError as error:
        raise JsonError(f"has half of a surrogate pair at character {error.start + 1}") from None
    try:
        value = _loaded(text)
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise JsonError(f"is nested deeper than {MAX_NESTING} levels") from None
    if text.count("[") + text.count("{") > MAX_NESTING:
        for _ in values_of(value):
            pass
    return value


def check_json(value: Any, *, max_bytes: int = MAX_JSON_BYTES, any_integers: bool = False) -> None:
    """JsonError unless JSON of at most `max_bytes` holds this value, and a reader gets it unchanged."""
    least_bytes = 0
    for item in values_of(value):
        if isinstance(item, str):
            check_text(item)
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise JsonError("has a number that is not finite, or too large")
        elif isinstance(item, int) and not (any_integers or _LEAST <= item <= _MOST):
            raise JsonError("has an integer of more than 64 bits")
        least_bytes += len(item) if isinstance(item, str) else 1
        if least_bytes > max_bytes:
            raise JsonError(f"has more than {max_bytes} bytes")
    size_bytes = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    if size_bytes > max_bytes:
        raise JsonError(f"has {size_bytes} bytes; at most {max_bytes} are accepted")


def check_text(text: str) -> None:
    """JsonError for a text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JsonError(f"has half of a surrogate pair at character {error.start + 1}") from None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    return not _SURROGATE.search(text)


def canonical_json(value: Any) -> str:
    """The same JSON for the same value, in whatever order its keys were given."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def values_of(value: Any) -> Iterator[Any]:
    """The value, what it holds, and all keys, without recursion. JsonError for what JSON has no kind for."""
    open_values = [(value, MAX_NESTING)]
    while open_values:
        item, levels = open_values.pop()
        yield item
        if isinstance(item, dict | list):
            if levels <= 0:
                raise JsonError(f"is nested deeper than {MAX_NESTING} levels")
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise JsonError("has a key that is not a text")
                    yield key
            children = item.values() if isinstance(item, dict) else item
            open_values.extend((child, levels - 1) for child in children)
        elif not isinstance(item, _PLAIN):
            raise JsonError(f"has a {type(item).__name__}, which JSON has not")


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, JsonError):
        raise
    except ValueError:  # an integer of more digits than Python reads
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return math.inf


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JsonError(f"has the key {twice[:80]!r} twice")
    return found

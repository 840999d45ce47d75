"""Arguments of `enqueue`, right ones and wrong ones of every kind, for properties over whole requests."""

from __future__ import annotations

from collections import OrderedDict
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
from hypothesis import strategies as st

__all__ = ("BODIES", "DEEP", "JSON", "ODD", "TEXTS", "nested", "shuffled")


class Color(StrEnum):
    """A text that is more than one."""

    RED = "red"


class Level(IntEnum):
    """A number that is more than one."""

    HIGH = 1


def nested(levels: int, kind: str = "list") -> Any:
    """A list, or an object, in another so many times."""
    value: Any = 1
    for _ in range(levels):
        value = [value] if kind == "list" else {"a": value}
    return value


CYCLE: dict[str, Any] = {}
CYCLE["self"] = CYCLE
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ("", "\0", "a\x1fb", "\ud800", "x\udfff", "\u2028", "\U0001f600", "\\ud800", '"', "x" * 300, "x" * 5000)
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from((0, -0.0, 2**31, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400, 1e308, True))
    | st.sampled_from((5000, 5001)).map(lambda digits: (-10) ** digits)  # more than Python prints
)
ODD = st.sampled_from(
    (
        None, b"bytes", {1}, object(), Decimal("1.5"), 1j, Color.RED, Level.HIGH, CYCLE, OrderedDict(a=1),
        np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("text"), np.arange(3),
        {1: 2}, {"a": {None: 1}}, ["x" * 40_000, "y" * 40_000], "x" * (2**20), ["\U0001f600" * 20_000],
    )
)  # fmt: skip
DEEP = st.builds(nested, st.sampled_from((63, 64, 65, 300, 5000, 100_000)), st.sampled_from(("list", "object")))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
ANY = JSON | ODD | DEEP
SCHEMAS = st.sampled_from(
    ('{"a": 1, "a": 2}', "[" * 100_000, '{"a": NaN}', '{"a": 1e999}', "{}", '{"a": "\\ud800"}')
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXTS | ANY,
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.just("user") | TEXTS, "content": TEXTS}), max_size=2
        )
        | ANY,
        "token_ids": st.lists(st.integers(0, 7000) | NUMBERS, max_size=4) | ANY,
        "max_tokens": st.integers(1, 20) | ANY,
        "min_tokens": st.integers(0, 5) | ANY,
        "temperature": st.floats(0, 2) | ANY,
        "top_p": st.floats(0.1, 1) | ANY,
        "top_k": st.integers(0, 50) | ANY,
        "min_p": st.floats(0, 1) | ANY,
        "seed": st.integers(0, 2**63 - 1) | ANY,
        "stop": st.lists(TEXTS, max_size=3) | ANY,
        "stop_token_ids": st.lists(st.integers(0, 7000) | NUMBERS, max_size=3) | ANY,
        "ignore_eos": st.booleans() | ANY,
        "presence_penalty": st.floats(-2, 2) | ANY,
        "repetition_penalty": st.floats(0.5, 2) | ANY,
        "logprobs": st.integers(0, 3) | ANY,
        "structured_outputs": st.fixed_dictionaries(
            {}, optional={"json": SCHEMAS | ANY, "regex": TEXTS | ANY, "choice": st.lists(TEXTS, max_size=3) | ANY}
        )
        | ANY,
        "priority": st.integers(-100, 100) | ANY,
        "metadata": st.dictionaries(TEXTS, JSON, max_size=5) | ANY,
        "deadline_s": st.floats(20, 1000) | ANY,
        "idempotency_key": TEXTS | ANY,
        "traceparent": st.just("00-" + "1" * 32 + "-" + "2" * 16 + "-01") | ANY,
        "max_tokenz": ANY,
        "\ud800": ANY,
    },
)


def shuffled(value: Any) -> Any:
    """The same value with the keys of all its objects in the opposite order."""
    if isinstance(value, dict):
        return {name: shuffled(inner) for name, inner in reversed(value.items())}
    return [shuffled(inner) for inner in value] if isinstance(value, list) else value

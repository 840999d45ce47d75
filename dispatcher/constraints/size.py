"""Size of a constraint's grammar by its text alone: the bound where vLLM is not installed. Pure."""

from __future__ import annotations

import json
import re

from pydantic import JsonValue

from l4queue.sampling import StructuredOutputs

__all__ = ("MAX_SIZE", "constraint_size")

MAX_SIZE = 100_000
"""Most parts of a constraint. xgrammar compiles this number in about 4 s on one core."""
_REPETITION = re.compile(r"\{(\d+)?(,)?(\d+)?\}")
_BOUNDS = ("minItems", "maxItems", "minProperties", "maxProperties", "min", "max")


def constraint_size(given: StructuredOutputs) -> int:
    """Parts of the grammar: characters and repetitions written out, and pairs of the properties of an object."""
    if given.regex is not None:
        return _regex_size(given.regex)
    if given.choice is not None:
        return sum(map(len, given.choice))
    if given.grammar is not None:
        return _regex_size(given.grammar)
    schema = given.structural_tag if given.json_schema is None else given.json_schema
    return _schema_size(json.loads(schema) if isinstance(schema, str) else schema)


def _schema_size(node: JsonValue) -> int:
    """Of one node: its parts, times as often as it may be repeated."""
    if isinstance(node, list):
        return 1 + sum(map(_schema_size, node))
    if not isinstance(node, dict):
        return 1
    size = 1 + sum(map(_schema_size, node.values()))
    properties = node.get("properties")
    if isinstance(properties, dict):  # any of them may be left out: a way from each to each
        size += len(properties) ** 2 // 2
    for name in ("pattern", "grammar"):  # the latter in structural tags
        if isinstance(pattern := node.get(name), str):
            size += _regex_size(pattern)
    patterns = node.get("patternProperties")
    if isinstance(patterns, dict):
        size += sum(map(_regex_size, patterns))
    bounds = [value for name in _BOUNDS if type(value := node.get(name)) is int]
    return _bounded(size * max([1, *bounds]))


def _regex_size(pattern: str) -> int:
    """Characters with every counted repetition written out."""
    groups = [0]
    last = 0  # size of what a repetition would repeat
    at = 0
    while at < len(pattern):
        character = pattern[at]
        found = _REPETITION.match(pattern, at) if character == "{" else None
        if found is not None and found.end() > at + 2:
            times = max(int(found[1] or 0), int(found[3] or 0), 1)
            groups[-1] = _bounded(groups[-1] + last * (times - 1))
            last = _bounded(last * times)
            at = found.end()
            continue
        if character == "(":
            groups.append(0)
        elif character == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] = _bounded(groups[-1] + last)
        else:
            width = 2 if character == "\\" else _class_width(pattern, at) if character == "[" else 1
            if character not in "*+?|":
                last = 1
                groups[-1] += 1
            at += width
            continue
        at += 1
    return _bounded(sum(groups) + 1)


def _class_width(pattern: str, at: int) -> int:
    """Characters of the class that begins here."""
    end = at + 1
    while end < len(pattern) and pattern[end] != "]":
        end += 2 if pattern[end] == "\\" else 1
    return end + 1 - at


def _bounded(size: int) -> int:
    """Beyond the bound the exact number says nothing, and would grow without end."""
    return min(size, MAX_SIZE + 1)

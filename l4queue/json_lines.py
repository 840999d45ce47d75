"""JSON as one line for every reader, whichever characters it takes for an end of line. Pure."""

from __future__ import annotations

import json
from typing import Any

__all__ = ("json_line",)

_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def json_line(value: Any) -> str:
    """`value` as JSON without any end of line. Other characters stand for themselves.

    JSON escapes the control characters; the three others at which `str.splitlines` and some editors break a line
    (next line, line separator, paragraph separator) are escaped too. They can stand in strings only.
    """
    return json.dumps(value, ensure_ascii=False).translate(_LINE_ENDS)

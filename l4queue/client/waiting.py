"""How long a wait may still last."""

from __future__ import annotations

import math
import time

from l4queue.errors import InvalidRequest, ResultTimeout

__all__ = ("RECHECK_S", "deadline_after", "time_left_s")

RECHECK_S = 5.0
"""How often a wait looks at the record itself, should its stream or mailbox have gone."""

_LONGEST_S = 1e9


def deadline_after(timeout: float | None) -> float | None:
    """The monotonic time at which a wait of `timeout` seconds ends; None waits for ever.

    InvalidRequest for what is no number of seconds.
    """
    if timeout is None:
        return None
    try:
        seconds = float(min(timeout, _LONGEST_S))
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if math.isnan(seconds):
        raise InvalidRequest("must be a number of seconds, or None", field="timeout")
    return time.monotonic() + seconds


def time_left_s(deadline: float | None, what: str) -> float:
    """Seconds until the deadline, or one recheck period without one; ResultTimeout once it has passed."""
    if deadline is None:
        return RECHECK_S
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise ResultTimeout(f"{what}; it goes on: wait again or cancel it")
    return left_s

"""The plan in force for its readers: an unreadable one leaves them with the one they know."""

from __future__ import annotations

from collections.abc import Iterable

from l4queue.errors import ConfigError
from l4queue.models import Plan
from l4queue.plan_json import NewerPlan, plan_from_json
from l4queue.protocol.foreign import report

__all__ = ("is_of_a_newer_release", "read_plan", "readable_plans")


def read_plan(body: str | None, *, key: str) -> Plan | None:
    """The plan of this JSON; None where there is none, or none that this release can read: that is reported."""
    if body is None:
        return None
    try:
        return plan_from_json(body)
    except ConfigError as error:
        report(key, error, body.encode(errors="replace"))
        return None


def is_of_a_newer_release(body: str) -> bool:
    """Whether it is a plan, but one that only a newer release understands."""
    try:
        plan_from_json(body)
    except NewerPlan:
        return True
    except ConfigError:
        return False
    return False


def readable_plans(bodies: Iterable[str], *, key: str) -> list[Plan]:
    """Those of them that this release can read, in order."""
    plans = (read_plan(body, key=key) for body in bodies)
    return [plan for plan in plans if plan is not None]

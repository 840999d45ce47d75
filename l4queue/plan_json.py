"""A plan as JSON and back. Input is checked: it may come from anywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from l4queue.compat import FORMAT, MAX_NUMBER
from l4queue.errors import ConfigError
from l4queue.models import Plan, Routing, StagePlan
from l4queue.strict_json import JsonError, read_json

__all__ = ("NewerPlan", "check_plan", "plan_from_json", "plan_to_json", "split_of")

MAX_PLAN_BYTES = 16 * 2**20
"""Largest plan that is read, bytes."""
_MAX_SHOWN_CHARS = 80  # of a wrong value in an error: one terminal line
_AFFINITY = "prefix_affinity"
"""A field of a plan that travels among its details: the first release refuses plans with unknown fields."""


class NewerPlan(ConfigError):
    """A plan that only a newer release understands: its planner's business, and nothing to repair."""


def split_of(stages: Sequence[StagePlan], *, prefix_affinity: bool = False) -> dict[str, Any]:
    """Boundaries and workers of stages, and prefix affinity, as decision logs and reports tell them."""
    split = {"boundaries": [s.low_tokens for s in stages[1:]], "workers": [s.num_workers for s in stages]}
    return {**split, _AFFINITY: True} if prefix_affinity else split


def plan_to_json(plan: Plan) -> str:
    """Compact JSON with sorted keys: the same plan gives the same bytes. ConfigError for NaN or infinity."""
    check_plan(plan)
    try:
        told = asdict(plan)
        if told.pop(_AFFINITY):
            told["details"][_AFFINITY] = True
        return json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"plan {plan.version} cannot be written as JSON: {error}") from None


def plan_from_json(text: str | bytes) -> Plan:
    """Read and check a plan. ConfigError names what is wrong: ranges must cover [0, ∞) once, in order.

    Fields that this release does not know are ignored. NewerPlan for a higher format version (`v`; plans of this
    one have none) and for a routing that it does not know.
    """
    try:
        data = read_json(text, max_bytes=MAX_PLAN_BYTES, any_integers=True)
    except JsonError as error:
        raise ConfigError(f"a plan must be JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
        raise ConfigError("a plan must be an object with a list `stages`")
    version = _whole(data.get("v", FORMAT), "v")
    if version > FORMAT:
        raise NewerPlan(f"plan.v is {version}; this release knows up to {FORMAT}")
    stages = tuple(_stage(i, item) for i, item in enumerate(data["stages"]))
    details = dict(_mapping(data.get("details", {}), "details"))
    plan = Plan(
        version=_whole(data.get("version"), "version"),
        stages=stages,
        reason=_text(data.get("reason", ""), "reason"),
        created_ms=_whole(data.get("created_ms", 0), "created_ms"),
        objective=_number(data.get("objective"), "objective"),
        objective_one_stage=_number(data.get("objective_one_stage"), "objective_one_stage"),
        routing=_routing(data.get("routing", Routing.L4)),
        prefix_affinity=_truth(details.pop(_AFFINITY, False), f"details.{_AFFINITY}"),
        details=details,
    )
    check_plan(plan)
    return plan


def check_plan(plan: Plan) -> None:
    """ConfigError unless the stages cover [0, ∞) once, in order, with counts ≥ 0 and no worker twice.

    With prefix affinity there is one, and no `details` has its name.
    """
    if not plan.stages:
        raise ConfigError(f"plan {plan.version} has no stages")
    if plan.prefix_affinity and len(plan.stages) > 1:
        raise ConfigError(f"plan {plan.version}: with {_AFFINITY} there is one stage, not {len(plan.stages)}")
    if _AFFINITY in plan.details:
        raise ConfigError(f"plan {plan.version}: {_AFFINITY} is a field of its own, none of its details")
    low = 0
    seen: set[str] = set()
    for i, stage in enumerate(plan.stages):
        if stage.low_tokens != low:
            raise ConfigError(f"plan {plan.version}: stage {i} begins at {stage.low_tokens}, expected {low}")
        is_last = i == len(plan.stages) - 1
        if is_last != (stage.high_tokens is None):
            raise ConfigError(f"plan {plan.version}: only the last stage is open-ended, stage {i} breaks that")
        if stage.high_tokens is not None and stage.high_tokens <= low:
            raise ConfigError(f"plan {plan.version}: stage {i} ends at {stage.high_tokens}, not above {low}")
        if stage.num_workers < 0:
            raise ConfigError(f"plan {plan.version}: stage {i} has {stage.num_workers} workers")
        twice = seen.intersection(stage.worker_ids)
        if twice or len(set(stage.worker_ids)) != len(stage.worker_ids):
            raise ConfigError(f"plan {plan.version}: stage {i} lists a worker twice")
        seen.update(stage.worker_ids)
        low = stage.high_tokens or low


def _stage(index: int, item: Any) -> StagePlan:
    where = f"stages[{index}]"
    if not isinstance(item, dict):
        raise ConfigError(f"{where} must be an object")
    high = item.get("high_tokens")
    ids = item.get("worker_ids", [])
    if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
        raise ConfigError(f"{where}.worker_ids must be a list of strings")
    return StagePlan(
        low_tokens=_whole(item.get("low_tokens"), f"{where}.low_tokens"),
        high_tokens=None if high is None else _whole(high, f"{where}.high_tokens"),
        num_workers=_whole(item.get("num_workers"), f"{where}.num_workers"),
        worker_ids=tuple(ids),
    )


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
        raise ConfigError(f"plan.{name} must be a whole number in [0, 2^53], got {_shown(value)}")
    return value


def _truth(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"plan.{name} must be true or false, got {_shown(value)}")
    return value


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"plan.{name} must be a finite number, got {_shown(value)}")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"plan.{name} must be text, got {_shown(value)}")
    return value


def _routing(value: Any) -> Routing:
    if not isinstance(value, str):
        raise ConfigError(f"plan.routing must be one of {', '.join(Routing)}, got {value!r}")
    try:
        return Routing(value)
    except ValueError:
        raise NewerPlan(f"plan.routing must be one of {', '.join(Routing)}, got {_shown(value)}") from None


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"plan.{name} must be an object, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value of a plan in an error, which is one line."""
    return repr(value)[:_MAX_SHOWN_CHARS]

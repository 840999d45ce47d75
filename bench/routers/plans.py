"""Plans that l4queue followed in a run of the race."""

from __future__ import annotations

from typing import Any

from l4queue import AsyncClient

__all__ = ("plans_since",)

_AT_MOST = 100  # plans of one run


async def plans_since(url: str, since_ms: float) -> list[dict[str, Any]]:
    """The plan that was in force at a time of this machine's clock, ms, and all later ones, oldest first."""
    async with AsyncClient(url) as client:
        published = (await client.plan_history(count=_AT_MOST))[::-1]
    later = [plan for plan in published if plan.created_ms >= since_ms]
    return [
        {
            "version": plan.version,
            "reason": plan.reason,
            "prefix_affinity": plan.prefix_affinity,
            "stages": [{"low_tokens": one.low_tokens, "workers": one.num_workers} for one in plan.stages],
        }
        for plan in published[-len(later) - 1 :]
    ]

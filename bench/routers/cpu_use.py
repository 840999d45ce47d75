"""CPU time of a race's processes: the engines' own, and that of everything around them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import psutil

__all__ = ("CpuUse", "cpu_between", "cpu_now")

CpuUse = Mapping[int, tuple[bool, float]]
"""By process id: whether it is an engine's core, and its CPU time, s."""
_CORE = "VLLM::"  # vLLM names its engine cores and workers so


def cpu_now() -> CpuUse:
    """Of all processes that this one has started, and of theirs."""
    found: dict[int, tuple[bool, float]] = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid] = (process.name().startswith(_CORE), times.user + times.system)
    return found


def cpu_between(before: CpuUse, after: CpuUse) -> dict[str, float]:
    """Seconds by engines' cores and by all else: servers, routers, queue; idle entrants are among it."""
    spent_s = {True: 0.0, False: 0.0}
    for pid, (is_core, total_s) in after.items():
        spent_s[is_core] += total_s - before.get(pid, (is_core, 0.0))[1]
    return {"core_cpu_s": round(spent_s[True], 2), "other_cpu_s": round(spent_s[False], 2)}

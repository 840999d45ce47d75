"""CPU time of a deployment's processes, and the cost of a fixed amount of work on this machine now."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil

__all__ = ("cpu_seconds", "fixed_work_ms")

_FIXED_WORK = 30_000  # loop turns; about 2 ms on one core


def cpu_seconds(processes: Mapping[str, int | None]) -> dict[str, float]:
    """CPU time so far, s, by name, of the process ids that exist; without that of children."""
    found = {}
    for name, pid in processes.items():
        if pid is None:
            continue
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        found[name] = times.user + times.system
    return found


def fixed_work_ms() -> float:
    """CPU time of the same work at every call, ms, some two: it rises when the host gives this machine less.

    Waiting for a core does not count, so other processes here hardly show in it.
    """
    began_s = time.thread_time()
    for number in range(_FIXED_WORK):
        number * number % 7
    return (time.thread_time() - began_s) * 1000

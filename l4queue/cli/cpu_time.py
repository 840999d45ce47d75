"""CPU time of the processes of a deployment."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

__all__ = ("cpu_seconds",)


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

"""CPU time of processes, from Linux's /proc; elsewhere nothing is known and nothing is said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ("cpu_seconds",)


def cpu_seconds(processes: Mapping[str, int | None]) -> dict[str, float]:
    """CPU time so far, s, by name, of the process ids that exist; without that of children."""
    found = {}
    for name, pid in processes.items():
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()  # the command before it may hold anything, brackets too
        found[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found

"""How the benchmarks measure CPU and tell what they found."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import psutil

__all__ = ("cpu_s", "machine", "tell")


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process up to now."""
    times = process.cpu_times()
    return float(times.user + times.system)


def machine() -> str:
    """What this ran on, in a line."""
    return f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}"


def tell(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print figures by name: as JSON, or one to a line."""
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<24} {value:.1f}" if isinstance(value, float) else f"{name:<24} {value}")

"""What a run has shown: medians with their spread, by entrant and size of prompts; ratios within each round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from l4queue.cli.bench.queue.measure import QueueRound
from l4queue.cli.bench.report import machine as machine_facts
from l4queue.cli.stack.embedded import find_redis_server

__all__ = ("machine", "quantiles", "ratios", "summaries")

_SPREAD = (
    "requests_per_s",
    "enqueued_per_s",
    "redis_commands",
    "bytes_in",
    "bytes_out",
    "kept_bytes",
    "foreign_cores",
    "fixed_work_ms",
)
_SOME = ("half_rate_per_s", "packed_bytes", "packing_cpu_s_per_1000")
"""Figures that not every queue has."""
_ONCE = ("sent_commands", "inside_commands", "commands", "versions")
_MISSING = {"median": None, "min": None, "max": None}


def summaries(rounds: Sequence[QueueRound]) -> list[dict[str, Any]]:
    """One entry for each entrant and size: median, min and max of its rounds, quantiles of all its latencies."""
    grouped: dict[tuple[str, int], list[QueueRound]] = {}
    for one in rounds:
        grouped.setdefault((one.entrant, one.prompt_bytes), []).append(one)
    return [_summary(name, size, each) for (name, size), each in grouped.items()]


def _summary(name: str, prompt_bytes: int, each: Sequence[QueueRound]) -> dict[str, Any]:
    kinds = list(each[0].cpu_s_per_1000)
    told = [one for one in each if one.sent_commands is not None]
    found: dict[str, Any] = {
        "name": name,
        "durability": each[0].durability,
        "prompt_bytes": prompt_bytes,
        "num_requests": sum(one.num_requests for one in each),
        **{field: _spread(getattr(one, field) for one in each) for field in _SPREAD},
        "cpu_s_per_1000": {kind: _spread(one.cpu_s_per_1000[kind] for one in each) for kind in kinds},
        **{field: getattr(told[0], field) if told else None for field in _ONCE},
        "alone_ms": _latencies([one.alone_ms for one in each]),
        "half_ms": _latencies([one.half_ms for one in each]),
        **{name: _spread(v for one in each if (v := getattr(one, name)) is not None) for name in _SOME},
    }
    left_out = {"alone_ms", "half_ms", "commands", "versions"}
    found["rounds"] = [{k: v for k, v in one.to_dict().items() if k not in left_out} for one in each]
    return found


def _spread(values: Iterable[float]) -> dict[str, float | None]:
    known = list(values)
    if not known:
        return dict(_MISSING)
    return {"median": statistics.median(known), "min": min(known), "max": max(known)}


def _latencies(rounds: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Of all rounds together."""
    found = {kind: [value for one in rounds for value in one.get(kind, ())] for kind in rounds[0]}
    return {kind: quantiles(values) for kind, values in found.items() if values}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Their number, median, 90th and 99th percentile."""
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return {"num": len(values), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def ratios(rounds: Sequence[QueueRound], *, ours: str) -> list[dict[str, Any]]:
    """Ours to each other entrant: of requests/s and of CPU time, each within a round, then median, min and max."""
    mine = {(one.round, one.prompt_bytes): one for one in rounds if one.entrant == ours}
    others: dict[tuple[str, int], list[tuple[QueueRound, QueueRound]]] = {}
    for one in rounds:
        if one.entrant != ours:
            pair = (mine[one.round, one.prompt_bytes], one)
            others.setdefault((one.entrant, one.prompt_bytes), []).append(pair)
    return [
        {
            "entrant": ours,
            "to": name,
            "prompt_bytes": size,
            "requests_per_s": _spread(a.requests_per_s / b.requests_per_s for a, b in pairs),
            "cpu_s": _spread(a.cpu_s_per_1000["total"] / b.cpu_s_per_1000["total"] for a, b in pairs),
        }
        for (name, size), pairs in others.items()
    ]


def machine() -> dict[str, Any]:
    """Where it was measured: processor, cores, memory, versions."""
    found = machine_facts()
    found["versions"]["redis-server"] = find_redis_server().text
    return {**found, "memory_bytes": psutil.virtual_memory().total}

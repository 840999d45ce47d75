"""The results of `bench queue` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ("latency_table", "packing_lines", "rate_table", "ratio_lines", "redis_table", "remark_lines")

_KINDS = ("total", "redis", "dispatcher", "worker", "client")
_QUIET_CORES = 0.2  # of other work; more is said to the reader
_STEADY = 1.05  # of the same work's CPU time from one round to another, as in `bench serve`


def rate_table(summaries: Sequence[Mapping[str, Any]]) -> Any:
    """Throughput and CPU time by process; medians of the rounds."""
    shown = _table("a rush of requests, every result read; CPU s per 1,000 requests")
    for name in ("requests/s (min–max)", "CPU s", "redis", "disp.", "worker", "client"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in summaries:
        rate, cpu = one["requests_per_s"], one["cpu_s_per_1000"]
        shown.add_row(
            one["name"],
            f"{rate['median']:,.0f} ({rate['min']:,.0f}–{rate['max']:,.0f})",
            *(f"{cpu[kind]['median']:.3f}" if kind in cpu else "" for kind in _KINDS),
        )
    return shown


def redis_table(summaries: Sequence[Mapping[str, Any]]) -> Any:
    """Commands, bytes and memory of one request."""
    shown = _table("Redis, for one request")
    for name in ("commands", "in scripts", "kB in", "kB out", "bytes kept", "packed"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in summaries:
        shown.add_row(
            one["name"],
            _number(one["sent_commands"], 1),
            _number(one["inside_commands"], 1),
            f"{one['bytes_in']['median'] / 1000:,.1f}",
            f"{one['bytes_out']['median'] / 1000:,.1f}",
            f"{one['kept_bytes']['median']:,.0f}",
            _number(one["packed_bytes"]["median"], 0),
        )
    return shown


def latency_table(summaries: Sequence[Mapping[str, Any]]) -> Any:
    """First token (`first`) and result, alone and at half of the rate."""
    shown = _table("latency, ms, p50 / p99: one at a time, then at half of the rate above")
    for name in ("first", "result", "at 1/s", "first", "result"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in summaries:
        alone, half = one["alone_ms"], one["half_ms"]
        shown.add_row(
            one["name"],
            _quantiles(alone, "first"),
            _quantiles(alone, "result"),
            _number(one["half_rate_per_s"]["median"], 0),
            _quantiles(half, "first"),
            _quantiles(half, "result"),
        )
    return shown


def _table(title: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    shown.add_column("queue", no_wrap=True)
    return shown


def ratio_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ours to each other, in words."""
    return [
        f"{one['entrant']} to {one['to']} ({one['prompt_bytes']:,} B): "
        f"requests/s {_ratio(one['requests_per_s'])}, CPU time {_ratio(one['cpu_s'])}"
        for one in found
    ]


def packing_lines(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not in the CPU time above."""
    return [
        f"{one['name']} packs what it keeps a while after the end: {cpu_s:.3f} CPU s of Redis more per 1,000"
        for one in summaries
        if (cpu_s := one["packing_cpu_s_per_1000"]["median"]) is not None
    ]


def remark_lines(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the machine was quiet and steady meanwhile."""
    rounds = [one for summary in summaries for one in summary["rounds"]]
    foreign, work = [one["foreign_cores"] for one in rounds], [one["fixed_work_ms"] for one in rounds]
    found = []
    if max(foreign) > _QUIET_CORES:
        found.append(
            f"the machine was not idle: other processes had {min(foreign):.1f} to {max(foreign):.1f} cores during "
            "the rushes; rates and latencies are worse for it, CPU time and counts hardly"
        )
    if max(work) > _STEADY * min(work):
        found.append(f"nor steady: the same work took {min(work):.2f} to {max(work):.2f} ms of CPU time")
    return found


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}–{spread['max']:.2f})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _quantiles(latencies: Mapping[str, Mapping[str, float]], kind: str) -> str:
    if kind not in latencies:
        return ""
    return " / ".join(
        _number(value, int(value < 100)) for value in (latencies[kind]["p50"], latencies[kind]["p99"])
    )

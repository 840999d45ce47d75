"""Arrivals for `bench serve`: a trace, a workload of the simulator, or a mix small enough for CPU engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from l4queue.errors import ConfigError
from l4queue.sim.traces.trace import Trace, read_trace
from l4queue.sim.traces.workload import WORKLOADS, make_workload

__all__ = ("bench_trace", "small_mix")

SHORT, LONG = (16, 256, 32), (3000, 6000, 64)
"""Shortest and longest prompt, output: tokens."""
DEFAULT_RATE_RPS = 3.0  # requests per second; two emulated or CPU engines serve that
FLIP_SHARES = (0.03, 0.25, 0.03)
"""Shares of long prompts in the thirds of `flip`; the rate changes so that the prompt tokens per second stay."""


def bench_trace(
    path: Path | None,
    workload: str,
    *,
    rate: float | None,
    duration_s: float,
    seed: int,
    rate_scale: float | None = None,
) -> Trace:
    """Arrivals for `duration_s` seconds. ConfigError for an unknown workload, or a trace that ends before.

    A trace is played at `rate`, or `rate_scale` times as fast as it was recorded, or as it is.
    """
    if rate_scale is not None and (path is None or rate is not None):
        raise ConfigError("--rate-scale goes with a trace and without --rate")
    if path is not None:
        trace = read_trace(path)
        trace = trace.scaled(rate_scale or (rate / trace.rate_rps if rate is not None else 1.0))
        kept = int(np.searchsorted(trace.arrival_s, duration_s))
        if kept < 1 or float(trace.arrival_s[-1]) < 0.9 * duration_s:
            raise ConfigError(f"{path}: the trace lasts {trace.arrival_s[-1]:.0f} s, not {duration_s:.0f} s")
        return trace.select(slice(0, kept))
    rng, rate = np.random.default_rng(seed), rate or DEFAULT_RATE_RPS
    if workload == "mixed":
        return small_mix(rate=rate, duration_s=duration_s, share_long=0.1, rng=rng)
    if workload == "flip":
        return _flip(rate=rate, duration_s=duration_s, rng=rng)
    if workload not in WORKLOADS:
        known = ", ".join(dict.fromkeys(("mixed", "flip", *WORKLOADS)))
        raise ConfigError(f"--workload: {workload!r} is unknown; choose from {known}, or give a trace")
    count = int(rate * duration_s * 1.5) + 20
    made = make_workload(workload, num_requests=count, rng=rng, rate_rps=rate)
    return made.select(slice(0, max(1, int(np.searchsorted(made.arrival_s, duration_s)))))


def small_mix(
    *, rate: float, duration_s: float, share_long: float, rng: np.random.Generator, name: str = "mixed"
) -> Trace:
    """Poisson arrivals of short and long requests, lengths uniform in `SHORT` and `LONG`."""
    count = int(rng.poisson(rate * duration_s)) or 1
    arrival = np.sort(rng.uniform(0.0, duration_s, count))
    is_long = rng.random(count) < share_long
    drawn = [rng.integers(low, high + 1, count) for low, high, _ in (SHORT, LONG)]
    return Trace(
        name=name,
        arrival_s=arrival,
        input_tokens=np.where(is_long, drawn[1], drawn[0]),
        output_tokens=np.where(is_long, LONG[2], SHORT[2]),
    )


def _flip(*, rate: float, duration_s: float, rng: np.random.Generator) -> Trace:
    """Three parts: few long prompts, many, few again."""
    third = duration_s / len(FLIP_SHARES)
    mean = [s * sum(LONG[:2]) / 2 + (1 - s) * sum(SHORT[:2]) / 2 for s in FLIP_SHARES]
    parts = [
        small_mix(rate=rate * mean[0] / m, duration_s=third, share_long=s, rng=rng)
        for s, m in zip(FLIP_SHARES, mean, strict=True)
    ]
    return Trace(
        name="flip",
        arrival_s=np.concatenate([part.arrival_s + third * i for i, part in enumerate(parts)]),
        input_tokens=np.concatenate([part.input_tokens for part in parts]),
        output_tokens=np.concatenate([part.output_tokens for part in parts]),
    )

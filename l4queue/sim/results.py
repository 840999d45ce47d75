"""Results of a finished run: the fixed keys of `l4queue simulate --json`. Defined in docs/latencies.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4queue.planning.steady_state import LONG_SHARE
from l4queue.sim.engine.request import SimRequest

__all__ = (
    "LONG_SHARE",
    "ClassResult",
    "Measured",
    "SimResult",
    "cached_share",
    "measure",
    "summarize",
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassResult:
    """Figures of one length class; None when it holds no request with the measure."""

    mean_e2e_s: float | None
    p99_tpot_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimResult:
    """One row of `results`. Seconds, counts, requests per second.

    `cached_share` is the share of prompt tokens found in a prefix cache; None where engines have none.
    """

    policy: str
    num_requests: int
    mean_e2e_s: float
    p50_e2e_s: float
    p95_e2e_s: float
    p99_e2e_s: float
    mean_normalized_latency_s: float
    mean_ttft_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    mean_tpot_s: float | None
    p99_tpot_s: float | None
    short: ClassResult
    long: ClassResult
    throughput_rps: float
    num_handovers: int
    num_steals: int
    num_preemptions: int
    cached_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Per-request measures, in order of arrival. `tpot_s` is NaN where only one token came out."""

    arrival_s: Floats
    finish_s: Floats
    e2e_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats

    @property
    def is_long(self) -> NDArray[np.bool_]:
        """Which requests are of the `long` class; ties at the edge are long."""
        total = self.prompt_tokens + self.output_tokens
        return np.asarray(total >= np.quantile(total, 1.0 - LONG_SHARE, method="higher"))

    def missed(self, *, ttft_ms: float, tpot_ms: float) -> NDArray[np.bool_]:
        """Which requests miss a service level: their first token, or the mean of the others, came too late."""
        return np.asarray((self.ttft_s > ttft_ms / 1000) | (np.nan_to_num(self.tpot_s) > tpot_ms / 1000))


def measure(requests: Sequence[SimRequest], *, warmup_share: float = 0.0) -> Measured:
    """Measures of the finished requests, without the first `warmup_share` of all arrivals."""
    kept = [r for r in requests[int(len(requests) * warmup_share) :] if r.finish_s is not None]
    arrival = np.array([r.arrival_s for r in kept], dtype=float)
    finish = np.array([r.finish_s for r in kept], dtype=float)
    first = np.array([r.first_token_s for r in kept], dtype=float)
    output = np.array([r.output_tokens for r in kept], dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(output > 1, (finish - first) / (output - 1), np.nan)
    return Measured(
        arrival_s=arrival,
        finish_s=finish,
        e2e_s=finish - arrival,
        ttft_s=first - arrival,
        tpot_s=tpot,
        prompt_tokens=np.array([r.prompt_tokens for r in kept], dtype=float),
        output_tokens=output,
    )


def cached_share(requests: Sequence[SimRequest], *, warmup_share: float = 0.0) -> float:
    """Share of the prompt tokens that a prefix cache had when the request was first admitted."""
    kept = [r for r in requests[int(len(requests) * warmup_share) :] if r.finish_s is not None]
    return sum(r.cached_tokens or 0 for r in kept) / sum(r.prompt_tokens for r in kept)


def summarize(
    policy: str,
    measured: Measured,
    *,
    num_handovers: int = 0,
    num_steals: int = 0,
    num_preemptions: int = 0,
    cached_share: float | None = None,
) -> SimResult:
    """The row of one policy."""
    e2e, ttft = measured.e2e_s, measured.ttft_s
    tpot = measured.tpot_s[~np.isnan(measured.tpot_s)]
    is_long = measured.is_long
    span_s = float(measured.finish_s.max() - measured.arrival_s.min())
    return SimResult(
        policy=policy,
        num_requests=len(e2e),
        mean_e2e_s=float(e2e.mean()),
        p50_e2e_s=float(np.quantile(e2e, 0.5)),
        p95_e2e_s=float(np.quantile(e2e, 0.95)),
        p99_e2e_s=float(np.quantile(e2e, 0.99)),
        mean_normalized_latency_s=float((e2e / measured.output_tokens).mean()),
        mean_ttft_s=float(ttft.mean()),
        p50_ttft_s=float(np.quantile(ttft, 0.5)),
        p99_ttft_s=float(np.quantile(ttft, 0.99)),
        mean_tpot_s=float(tpot.mean()) if tpot.size else None,
        p99_tpot_s=float(np.quantile(tpot, 0.99)) if tpot.size else None,
        short=_class_result(measured, ~is_long),
        long=_class_result(measured, is_long),
        throughput_rps=len(e2e) / span_s if span_s > 0 else 0.0,
        num_handovers=num_handovers,
        num_steals=num_steals,
        num_preemptions=num_preemptions,
        cached_share=cached_share,
    )


def _class_result(measured: Measured, mask: NDArray[np.bool_]) -> ClassResult:
    e2e, tpot = measured.e2e_s[mask], measured.tpot_s[mask]
    tpot = tpot[~np.isnan(tpot)]
    return ClassResult(
        mean_e2e_s=float(e2e.mean()) if e2e.size else None,
        p99_tpot_s=float(np.quantile(tpot, 0.99)) if tpot.size else None,
    )

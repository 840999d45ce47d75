"""Seeded synthetic workloads: Poisson arrivals, lengths drawn from published quantiles.

Each length is drawn by inverse transform from a piecewise log-linear quantile function through the points
below. Prompt and output are independent; in real traffic they are not quite. Sources: `chat` and `code`,
Azure LLM inference traces 2023 (Patel et al., ISCA 2024); `long-context`, Mooncake conversation trace (Qin et
al., FAST 2025); `reasoning`, ServeGen DeepSeek-R1 (Xiang et al., arXiv 2505.09999); `sharegpt`, log-normals
with the means of the vLLM paper (Kwon et al., SOSP 2023, figure 11: 161 in, 338 out). `mixed` is 90 % chat and
10 % long-context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l4queue.errors import ConfigError
from l4queue.sim.traces.trace import Trace

__all__ = ("WORKLOADS", "LengthModel", "make_workload")

PROBABILITIES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Points at which length models state their quantiles, no unit. Chosen: denser in the tail, which decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthModel:
    """Quantiles of prompt and output length at `PROBABILITIES`, tokens."""

    input_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]

    def draw(self, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`count` prompts and outputs."""
        return _draw(self.input_tokens, count, rng), _draw(self.output_tokens, count, rng)


CHAT = LengthModel(
    input_tokens=(2, 39, 310, 398, 1033, 1204, 4076, 4086, 4123, 5225, 14050),
    output_tokens=(7, 16, 49, 80, 134, 396, 427, 459, 609, 939, 1000),
)
CODE = LengthModel(
    input_tokens=(3, 17, 147, 575, 1459, 2702, 5012, 7315, 7436, 7437, 7437),
    output_tokens=(6, 6, 7, 9, 13, 23, 53, 85, 247, 842, 1899),
)
LONG_CONTEXT = LengthModel(
    input_tokens=(891, 894, 969, 2507, 7640, 16254, 28637, 41792, 91206, 121298, 123192),
    output_tokens=(1, 3, 24, 151, 356, 476, 608, 707, 1104, 2000, 2000),
)
REASONING = LengthModel(
    input_tokens=(4, 9, 13, 20, 88, 425, 1913, 6252, 20113, 30503, 44352),
    output_tokens=(41, 153, 331, 486, 924, 1429, 2100, 3657, 10798, 20822, 32768),
)
# log-normal with mean 161 and 338, σ = 1.2 and 0.95, cut at 2,048
SHAREGPT = LengthModel(
    input_tokens=(4, 5, 17, 35, 78, 176, 365, 565, 1279, 2048, 2048),
    output_tokens=(4, 24, 64, 113, 215, 408, 727, 1026, 1961, 2048, 2048),
)

WORKLOADS: Mapping[str, tuple[tuple[float, LengthModel], ...]] = {
    "chat": ((1.0, CHAT),),
    "code": ((1.0, CODE),),
    "long-context": ((1.0, LONG_CONTEXT),),
    "reasoning": ((1.0, REASONING),),
    "mixed": ((0.9, CHAT), (0.1, LONG_CONTEXT)),
    "sharegpt": ((1.0, SHAREGPT),),
}
"""Name → (share of requests, lengths)."""


def make_workload(name: str, *, num_requests: int, rng: np.random.Generator, rate_rps: float = 1.0) -> Trace:
    """`num_requests` requests with Poisson arrivals at `rate_rps`. Raises ConfigError for an unknown name."""
    if name not in WORKLOADS:
        raise ConfigError(f"workload {name!r} is unknown; choose one of {', '.join(WORKLOADS)}")
    if num_requests < 1 or rate_rps <= 0:
        raise ConfigError(f"workload {name!r}: needs at least one request and a positive rate")
    parts = WORKLOADS[name]
    arrival = np.cumsum(rng.exponential(1.0 / rate_rps, num_requests))
    choice = rng.choice(len(parts), size=num_requests, p=[share for share, _ in parts])
    inputs = np.empty(num_requests, dtype=np.int64)
    outputs = np.empty(num_requests, dtype=np.int64)
    for index, (_, model) in enumerate(parts):
        rows = np.flatnonzero(choice == index)
        inputs[rows], outputs[rows] = model.draw(len(rows), rng)
    return Trace(name=name, arrival_s=arrival, input_tokens=inputs, output_tokens=outputs)


def _draw(quantiles: tuple[int, ...], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    at = rng.random(count)
    drawn: NDArray[np.float64] = np.exp(np.interp(at, PROBABILITIES, np.log(quantiles)))
    whole: NDArray[np.int64] = np.maximum(1.0, np.rint(drawn)).astype(np.int64)
    return whole

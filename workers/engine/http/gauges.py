"""State of a vLLM server by its Prometheus metrics: the families that a worker needs, summed over its engines."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ("ServerGauges", "read_gauges")

_SAMPLE = re.compile(r"^vllm:(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerGauges:
    """What a server told of itself at one moment. `num_steps` and `num_preemptions` only grow while it lives."""

    kv_capacity_tokens: int
    num_running: int
    num_waiting: int
    kv_share: float
    num_steps: int
    num_preemptions: int
    is_speculating: bool
    has_prefix_cache: bool = False


def read_gauges(text: str) -> ServerGauges:
    """Read an exposition. What a server does not tell is 0; its KV cache is the sum of those of its engines."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    capacity_tokens, has_prefix_cache = 0, False
    for name, labels, value in _SAMPLE.findall(text):
        if name == "cache_config_info":
            facts = dict(_LABEL.findall(labels))
            capacity_tokens += _capacity_tokens(facts)
            has_prefix_cache |= facts.get("enable_prefix_caching") == "True"
        elif name in _FAMILIES or name.startswith("spec_decode_"):
            sums[name] = sums.get(name, 0.0) + float(value)
            counts[name] = counts.get(name, 0) + 1
    shares = "kv_cache_usage_perc"
    return ServerGauges(
        kv_capacity_tokens=capacity_tokens,
        num_running=round(sums.get("num_requests_running", 0.0)),
        num_waiting=round(sums.get("num_requests_waiting", 0.0)),
        kv_share=sums.get(shares, 0.0) / max(1, counts.get(shares, 0)),
        num_steps=round(sums.get("iteration_tokens_total_count", 0.0)),
        num_preemptions=round(sums.get("num_preemptions_total", 0.0)),
        is_speculating=any(name.startswith("spec_decode_") for name in sums),
        has_prefix_cache=has_prefix_cache,
    )


_FAMILIES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "iteration_tokens_total_count",
        "num_preemptions_total",
    }
)


def _capacity_tokens(labels: dict[str, str]) -> int:
    """Of one engine: what it says, else its blocks."""
    told = labels.get("kv_cache_size_tokens", "")
    if told.isdecimal():
        return int(told)
    blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    return int(blocks) * int(size) if blocks.isdecimal() and size.isdecimal() else 0

"""The policies by name, as `--policy` takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from l4queue.errors import ConfigError
from l4queue.sim.policies.affinity import CacheAware, DynamoKv, LlmD, SessionSticky
from l4queue.sim.policies.central import Central, CentralSjf, Clairvoyant
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.policies.l4_prefixes import PrefixL4
from l4queue.sim.policies.length_blind import LeastRequests, LeastTokens, Llumnix, PowerOfTwo, Random, RoundRobin
from l4queue.sim.policies.split import LoadSplit
from l4queue.sim.policy import Policy
from l4queue.sim.prove import prove_recent
from l4queue.sim.runner import RunConfig
from l4queue.sim.traces.trace import Trace
from l4queue.sim.tuning import tune_split, tune_two_pool

__all__ = ("AFFINITY", "LENGTH_BLIND", "POLICIES", "make_policy", "parse_policies")

_SIMPLE: Mapping[str, Callable[[], Policy]] = {
    "round-robin": RoundRobin,
    "random": Random,
    "least-requests": LeastRequests,
    "least-tokens": LeastTokens,
    "power-of-two": PowerOfTwo,
    "llumnix": Llumnix,
    "session-sticky": SessionSticky,
    "cache-aware": CacheAware,
    "llm-d": LlmD,
    "dynamo-kv": DynamoKv,
    "split-by-load": LoadSplit,
    "central": Central,
    "central-sjf": CentralSjf,
    "clairvoyant": Clairvoyant,
}

POLICIES = (
    "round-robin",
    "random",
    "least-requests",
    "least-tokens",
    "power-of-two",
    "two-pool",
    "split",
    "split-by-load",
    "llumnix",
    "session-sticky",
    "cache-aware",
    "llm-d",
    "dynamo-kv",
    "central",
    "central-sjf",
    "l4",
    "clairvoyant",
)

LENGTH_BLIND = (
    "round-robin",
    "random",
    "least-requests",
    "least-tokens",
    "power-of-two",
    "llumnix",
    "central",
    "central-sjf",
)
"""What `l4` is compared with as "best length-blind": they route without length classes."""

AFFINITY = ("session-sticky", "cache-aware", "llm-d", "dynamo-kv")
"""Routers that look for cached prefixes, or keep sessions together."""


def parse_policies(text: str) -> tuple[str, ...]:
    """Names of a comma-separated list, in order, without repeats; "all" for every one."""
    if text.strip() == "all":
        return POLICIES
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"policy {name!r} is unknown; choose from {', '.join(POLICIES)} or all")
    if not names:
        raise ConfigError(f"no policy given; choose from {', '.join(POLICIES)} or all")
    return names


def make_policy(name: str, *, trace: Trace, setting: RunConfig, options: L4Options | None = None) -> Policy:
    """A fresh policy for one run. `two-pool` and `split` are tuned on the trace by simulation."""
    if name == "two-pool":
        return tune_two_pool(trace, setting)
    if name == "split":
        return tune_split(trace, setting)
    if name == "l4":
        options = options or L4Options()
        knows_prefixes = trace.chains is not None and "affinity" not in options.without
        return PrefixL4(options) if knows_prefixes else L4(options, prove=prove_recent)
    return _SIMPLE[name]()

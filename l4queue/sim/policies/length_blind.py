"""Length-blind policies that bind a request to an engine on arrival, and the migrating llumnix."""

from __future__ import annotations

from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policy import Policy

__all__ = ("LeastRequests", "LeastTokens", "Llumnix", "PowerOfTwo", "Random", "RoundRobin")


class RoundRobin(Policy):
    """Requests go to the engines in turn."""

    name = "round-robin"

    def __init__(self) -> None:
        self._next = 0

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        instances = self.cluster.instances
        self.cluster.push(request, instances[self._next])
        self._next = (self._next + 1) % len(instances)


class Random(Policy):
    """Requests go to an engine drawn at random."""

    name = "random"

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        instances = self.cluster.instances
        self.cluster.push(request, instances[int(self.cluster.rng.integers(len(instances)))])


class LeastRequests(Policy):
    """Requests go to the engine with the fewest; ties to the lowest index."""

    name = "least-requests"

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        self.cluster.push(request, min(self.cluster.instances, key=_num_requests))


class LeastTokens(Policy):
    """Requests go to the engine with the fewest tokens in the cache and yet to prefill."""

    name = "least-tokens"

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        self.cluster.push(request, min(self.cluster.instances, key=_held_tokens))


class PowerOfTwo(Policy):
    """Of two engines drawn at random, the one with fewer requests."""

    name = "power-of-two"

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        instances = self.cluster.instances
        first, second = self.cluster.rng.integers(len(instances), size=2)
        self.cluster.push(request, min(instances[first], instances[second], key=_num_requests))


class Llumnix(Policy):
    """Least-load dispatch with migration of running requests (after Sun et al., OSDI 2024).

    Load is their freeness: free KV tokens per request in the batch, waiting prompts counted as used. Twice
    a second the least free engines (freeness below `source_steps` decode steps) each pass their shortest
    decoding request to one of the freest, at most one move per pair, if that does not turn the order round.
    """

    name = "llumnix"
    tick_s = 0.5
    source_steps = 2_000.0

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        self.cluster.push(request, max(self.cluster.instances, key=_freeness))

    def on_tick(self, now_s: float) -> None:
        ordered = sorted(self.cluster.instances, key=_freeness)
        for source, target in zip(ordered, reversed(ordered), strict=True):
            if _freeness(source) >= min(_freeness(target), self.source_steps) or source is target:
                break
            self._move_shortest(source, target)

    def _move_shortest(self, source: Instance, target: Instance) -> None:
        candidates = [(length, r.index, r) for r, length in source.decoding_lengths() if r not in source.removals]
        if not candidates:
            return
        length, _, request = min(candidates)
        if length < target.kv_free_tokens and source.num_requests > target.num_requests + 1:
            self.cluster.ask_back(request, source, target)

    def on_removed(self, instance: Instance, request: SimRequest, tag: object, now_s: float) -> None:
        assert isinstance(tag, Instance)
        self.cluster.send(request, tag)


def _num_requests(instance: Instance) -> int:
    return instance.num_requests


def _held_tokens(instance: Instance) -> int:
    return instance.held_tokens


def _freeness(instance: Instance) -> float:
    return instance.kv_free_tokens / max(1, instance.num_requests)

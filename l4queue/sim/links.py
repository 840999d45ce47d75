"""Links of simulated engines: KV transfers wait for each other, and take time from the engines at both ends."""

from __future__ import annotations

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.sim.engine.instance import Instance

__all__ = ("Links",)


class Links:
    """One link for each engine, to send and to receive. A transfer has the links of both ends to itself, in order.

    The copy reads or writes each token's KV once at each end. An engine that is busy then loses what a decode that
    attends to as many tokens costs it: γ a token.
    """

    def __init__(self, price: MovePrice, *, cost: StepCost) -> None:
        self._price = price
        self._cost = cost
        self._free_s: dict[int, float] = {}

    def wait_ms(self, instance: Instance, now_s: float) -> float:
        """How long the link of an engine is taken from now on, ms."""
        return max(0.0, self._free_s.get(instance.index, 0.0) - now_s) * 1000.0

    def landed_s(self, now_s: float, length_tokens: int, *, source: Instance, target: Instance) -> float:
        """When a request that leaves now is at its target with its KV cache."""
        ends = (source.index, target.index)
        begin_s = max(now_s, *(self._free_s.get(end, 0.0) for end in ends))
        copied_s = begin_s + self._price.transit_ms(length_tokens) / 1000.0 - self._price.fixed_ms / 1000.0
        for end in ends:
            self._free_s[end] = copied_s
        for instance in (source, target):
            instance.copy_kv(self._cost.gamma_ms * length_tokens)
        return copied_s + self._price.fixed_ms / 1000.0

"""Late binding: one queue from which engines with room pull, and static pools with a queue each."""

from __future__ import annotations

from l4queue.policy.queue_order import ageing_tokens_per_s
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.pool import Pool
from l4queue.sim.policy import Fleet, Policy

__all__ = ("Central", "CentralSjf", "Clairvoyant", "TwoPool")


class Central(Policy):
    """One queue in order of arrival, engines pull when they have room."""

    name = "central"

    def attach(self, cluster: Fleet) -> None:
        super().attach(cluster)
        self._ageing_tokens_per_s = ageing_tokens_per_s(cluster.cost)
        self._pools = self._make_pools()
        self._pool_of = {i.index: pool for pool in self._pools for i in pool.instances}

    def _make_pools(self) -> list[Pool]:
        return [Pool(self.cluster.instances, score=self._score)]

    def _score(self, request: SimRequest) -> float:
        return request.arrival_s

    def _pool_for(self, request: SimRequest) -> Pool:
        return self._pools[0]

    @property
    def num_queued(self) -> int:
        return sum(map(len, self._pools))

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        pool = self._pool_for(request)
        pool.put(request)
        if len(pool) == 1:
            pool.place(self.cluster.push)

    def on_boundary(self, instance: Instance, now_s: float) -> None:
        self._pool_of[instance.index].pull(instance, self.cluster.push)


class CentralSjf(Central):
    """One queue, shortest prompt first with ageing."""

    name = "central-sjf"

    def _score(self, request: SimRequest) -> float:
        return request.arrival_s + request.prompt_tokens / self._ageing_tokens_per_s


class Clairvoyant(Central):
    """Knows output lengths: one queue, least total work first with ageing. A reference, not a policy."""

    name = "clairvoyant"

    def _score(self, request: SimRequest) -> float:
        cost = self.cluster.cost
        mean_length = request.prompt_tokens + request.output_tokens / 2
        decode_ms = request.output_tokens * (cost.beta_ms + cost.gamma_ms * mean_length)
        per_token_ms = cost.pi_ms or 1.0
        work_tokens = (cost.prefill_ms(request.prompt_tokens) + decode_ms) / per_token_ms
        return request.arrival_s + work_tokens / self._ageing_tokens_per_s


class TwoPool(Central):
    """Two static pools by prompt length, each with its queue: the best known length-aware setting without L4."""

    name = "two-pool"

    def __init__(self, *, threshold_tokens: int, num_short: int) -> None:
        self.threshold_tokens = threshold_tokens
        self.num_short = num_short

    def _make_pools(self) -> list[Pool]:
        instances = self.cluster.instances
        short, long = instances[: self.num_short], instances[self.num_short :]
        return [Pool(part, score=self._score) for part in (short, long)]

    def _pool_for(self, request: SimRequest) -> Pool:
        return self._pools[0 if request.prompt_tokens < self.threshold_tokens else 1]

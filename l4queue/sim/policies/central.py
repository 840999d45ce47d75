"""Late binding: one queue from which engines with room pull, and static pools with a queue each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from heapq import heappop, heappush

from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policy import Fleet, Policy
from l4queue.sim.wake import WakeRace

__all__ = ("Central", "CentralSjf", "Clairvoyant", "Pool", "TwoPool")

AGEING_TOKENS_PER_S = 2000.0
"""Prompt tokens that a second of waiting counts as; the live system's default."""


class Pool:
    """A queue in serving order and the engines that pull from it.

    An engine has room while less than one step's budget of prefill is pending in it, a batch slot is
    free and the KV cache holds the prompt with a reserve for the growth of what runs. Of several engines with
    room `race` says which takes the request.
    """

    __slots__ = ("_heap", "_race", "_reserve_share", "_score", "_sequence", "instances")

    def __init__(
        self,
        instances: Sequence[Instance],
        *,
        score: Callable[[SimRequest], float],
        race: WakeRace,
        reserve_share: float = 0.1,
    ) -> None:
        self.instances = list(instances)
        self._score = score
        self._race = race
        self._heap: list[tuple[float, int, SimRequest]] = []
        self._sequence = 0
        self._reserve_share = reserve_share

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def head(self) -> SimRequest:
        """The request that is next in order; only while there is one."""
        return self._heap[0][2]

    @property
    def queued_tokens(self) -> int:
        """Length of all waiting requests."""
        return sum(entry[2].length for entry in self._heap)

    def queued(self) -> Iterator[SimRequest]:
        """Waiting requests in no particular order."""
        return (entry[2] for entry in self._heap)

    def take(self) -> SimRequest:
        """Take the head out."""
        return heappop(self._heap)[2]

    def put(self, request: SimRequest) -> None:
        """Queue a request by its score, ties in order of arrival."""
        self._sequence += 1
        heappush(self._heap, (self._score(request), self._sequence, request))

    def has_room(self, instance: Instance, request: SimRequest) -> bool:
        """Whether the engine may pull the request now."""
        cost = instance.cost
        if instance.pending_tokens >= cost.max_batched_tokens or instance.num_requests >= cost.max_num_seqs:
            return False
        free = instance.kv_free_tokens - request.length
        return free >= self._reserve_share * cost.kv_capacity_tokens or instance.num_requests == 0

    def place(self, push: Callable[[SimRequest, Instance], None]) -> None:
        """Hand out the head of the queue while some engine has room for it."""
        while self._heap:
            request = self._heap[0][2]
            first = self._race.first(self.instances, has_room=partial(self.has_room, request=request))
            if first is None:
                return
            heappop(self._heap)
            push(request, first)

    def pull(self, instance: Instance, push: Callable[[SimRequest, Instance], None]) -> None:
        """Let one engine take from the head while it has room."""
        while self._heap and self.has_room(instance, self._heap[0][2]):
            push(heappop(self._heap)[2], instance)


class Central(Policy):
    """One queue in order of arrival, engines pull when they have room."""

    name = "central"

    def attach(self, cluster: Fleet) -> None:
        super().attach(cluster)
        self._pools = self._make_pools()
        self._pool_of = {i.index: pool for pool in self._pools for i in pool.instances}

    def _make_pools(self) -> list[Pool]:
        return [Pool(self.cluster.instances, score=self._score, race=self.cluster.race)]

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
        return request.arrival_s + request.prompt_tokens / AGEING_TOKENS_PER_S


class Clairvoyant(Central):
    """Knows output lengths: one queue, least total work first with ageing. A reference, not a policy."""

    name = "clairvoyant"

    def _score(self, request: SimRequest) -> float:
        cost = self.cluster.cost
        mean_length = request.prompt_tokens + request.output_tokens / 2
        decode_ms = request.output_tokens * (cost.beta_ms + cost.gamma_ms * mean_length)
        per_token_ms = cost.pi_ms or 1.0
        work_tokens = (cost.prefill_ms(request.prompt_tokens) + decode_ms) / per_token_ms
        return request.arrival_s + work_tokens / AGEING_TOKENS_PER_S


class TwoPool(Central):
    """Two static pools by prompt length, each with its queue: the best known length-aware setting without L4."""

    name = "two-pool"

    def __init__(self, *, threshold_tokens: int, num_short: int) -> None:
        self.threshold_tokens = threshold_tokens
        self.num_short = num_short

    def _make_pools(self) -> list[Pool]:
        instances = self.cluster.instances
        short, long = instances[: self.num_short], instances[self.num_short :]
        return [Pool(part, score=self._score, race=self.cluster.race) for part in (short, long)]

    def _pool_for(self, request: SimRequest) -> Pool:
        return self._pools[0 if request.prompt_tokens < self.threshold_tokens else 1]

"""The event loop: instances, a policy, a trace; events are values ordered by (time, kind, sequence)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum
from heapq import heappop, heappush

import numpy as np

from l4queue.cost.move import MovePrice
from l4queue.cost.step import BLOCK_TOKENS, StepCost
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.prefix_cache import PrefixCache
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.links import Links
from l4queue.sim.policy import Policy

__all__ = ("Cluster", "Event", "EventKind")


class EventKind(IntEnum):
    """What happens, in the order in which ties in time are served.

    Finishes come first, so that an arrival at the same instant finds the room they leave; idle engines
    start after all arrivals of the instant, so that these share a step; the tick is last, so that it sees
    the state after everything else.
    """

    BOUNDARY = 0
    LANDED = 1
    ARRIVAL = 2
    START = 3
    TICK = 4


#: (time_s, kind, sequence, instance index or request, segment version or target)
Event = tuple[float, int, int, object, object]


class Cluster:
    """Runs one policy over one trace, as its `Fleet`. Single use: build, `run()`, read `requests`.

    `observe`, when given, is called after every event: tests check conservation there, the command line
    moves its progress bar. Engines have prefix caches where the requests have content; KV transfers then share
    links and take engine time.
    """

    def __init__(
        self,
        requests: Sequence[SimRequest],
        *,
        cost: StepCost,
        num_instances: int,
        policy: Policy,
        rng: np.random.Generator,
        price: MovePrice | None = None,
        block_tokens: int = BLOCK_TOKENS,
        observe: Callable[[Cluster], None] | None = None,
    ) -> None:
        self.requests = requests
        self.cost = cost
        has_content = any(request.chain for request in requests)
        caches = [PrefixCache(block_tokens) if has_content else None for _ in range(num_instances)]
        self.instances = [
            Instance(i, cost=cost, prefix_cache=cache, block_tokens=block_tokens) for i, cache in enumerate(caches)
        ]
        self.policy = policy
        self.rng = rng
        self._price = price or MovePrice()
        self._on_the_way_bytes: dict[SimRequest, int] = {}  # of KV caches, where the room for them is bounded
        self._links = Links(self._price, cost=cost) if has_content else None
        self._released_by: Instance | None = None
        self.now_s = 0.0
        self.num_arrived = 0
        self.num_finished = 0
        self.num_in_transit = 0
        self.num_handovers = 0
        self.num_steals = 0
        self._observe = observe
        self._heap: list[Event] = []
        self._sequence = 0

    def run(self, until_s: float | None = None) -> None:
        """Play the trace to its end, or stop at `until_s` with whatever is then unfinished."""
        self.policy.attach(self)
        self._schedule_arrival()
        if self.policy.tick_s:
            self._put(self.policy.tick_s, EventKind.TICK, None, None)
        heap = self._heap
        total = len(self.requests)
        observe = self._observe
        while heap and self.num_finished < total:
            time_s, kind, _, subject, detail = heappop(heap)
            if until_s is not None and time_s > until_s:
                break
            if kind == EventKind.BOUNDARY:
                assert isinstance(subject, Instance)
                if subject.version != detail:
                    continue
                self.now_s = time_s
                self._boundary(subject)
            else:
                self.now_s = time_s
                self._handle(kind, subject, detail)
            if observe is not None:
                observe(self)

    @property
    def price(self) -> MovePrice:
        """See `Fleet`."""
        if self._price.room_bytes is None:
            return self._price
        return replace(self._price, room_bytes=self._price.room_bytes - sum(self._on_the_way_bytes.values()))

    def copies_due_ms(self, instance: Instance) -> float:
        """See `Fleet`."""
        return self._links.wait_ms(instance, self.now_s) if self._links is not None else 0.0

    # ---------------------------------------------------------------- verbs for policies

    def push(self, request: SimRequest, instance: Instance) -> None:
        """See `Fleet`."""
        instance.push(request)
        self._wake(instance)

    def push_stolen(self, request: SimRequest, thief: Instance) -> None:
        """See `Fleet`."""
        self._count_steal(request)
        self.push(request, thief)

    def ask_back(self, request: SimRequest, instance: Instance, tag: object) -> None:
        """See `Fleet`."""
        instance.ask_back(request, tag)
        self._wake(instance)

    def send(self, request: SimRequest, target: Instance) -> None:
        """See `Fleet`."""
        self.num_handovers += 1
        request.num_handovers += 1
        self._transfer(request, target)

    def steal(self, request: SimRequest, target: Instance) -> None:
        """See `Fleet`."""
        self._count_steal(request)
        self._transfer(request, target)

    def _count_steal(self, request: SimRequest) -> None:
        self.num_steals += 1
        request.num_steals += 1

    def _transfer(self, request: SimRequest, target: Instance) -> None:
        price = self.price
        request.has_kv = price.is_sent(request.length)
        if request.has_kv and price.room_bytes is not None:
            self._on_the_way_bytes[request] = request.length * price.kv_bytes_per_token
        self.num_in_transit += 1
        source = self._released_by
        if self._links is None or source is None or not request.has_kv:
            landed_s = self.now_s + price.transit_ms(request.length) / 1000.0
        else:
            landed_s = self._links.landed_s(self.now_s, request.length, source=source, target=target)
        self._put(landed_s, EventKind.LANDED, request, target)

    # ---------------------------------------------------------------- events

    def _put(self, time_s: float, kind: EventKind, subject: object, detail: object) -> None:
        self._sequence += 1
        heappush(self._heap, (time_s, int(kind), self._sequence, subject, detail))

    def _schedule_arrival(self) -> None:
        if self.num_arrived < len(self.requests):
            request = self.requests[self.num_arrived]
            self._put(request.arrival_s, EventKind.ARRIVAL, request, None)

    def _handle(self, kind: int, subject: object, detail: object) -> None:
        if kind == EventKind.ARRIVAL:
            assert isinstance(subject, SimRequest)
            self.num_arrived += 1
            self._schedule_arrival()
            self.policy.on_arrival(subject, self.now_s)
        elif kind == EventKind.LANDED:
            assert isinstance(subject, SimRequest)
            assert isinstance(detail, Instance)
            self.num_in_transit -= 1
            self._on_the_way_bytes.pop(subject, None)
            self.push(subject, detail)
        elif kind == EventKind.START:
            assert isinstance(subject, Instance)
            if subject.end_s is None:
                self._start(subject)
        else:
            self.policy.on_tick(self.now_s)
            assert self.policy.tick_s is not None
            self._put(self.now_s + self.policy.tick_s, EventKind.TICK, None, None)

    def _boundary(self, instance: Instance) -> None:
        instance.finish_segment()
        self.num_finished += len(instance.finished)
        policy = self.policy
        now_s = self.now_s
        started, alarmed = instance.started, instance.alarmed
        if started:
            policy.on_started(instance, started, now_s)
        if instance.finished:
            policy.on_finished(instance, instance.finished, now_s)
        for request in alarmed:
            policy.on_alarm(instance, request, now_s)
        self._release(instance)
        policy.on_boundary(instance, now_s)
        self._release(instance)
        if instance.end_s is None:
            self._start(instance)

    def _release(self, instance: Instance) -> None:
        """Give the policy what it has asked back; before and after it acts at the boundary."""
        if instance.removals:
            instance.release_now()
        removed, instance.removed = instance.removed, []
        self._released_by = instance
        for request, tag in removed:
            self.policy.on_removed(instance, request, tag, self.now_s)
        self._released_by = None

    def _wake(self, instance: Instance) -> None:
        """Let an idle engine start, or end its decode run at the next boundary."""
        if instance.end_s is None:
            if not instance.is_at_boundary:
                instance.is_at_boundary = True
                self._put(self.now_s, EventKind.START, instance, None)
        elif instance.interrupt(self.now_s):
            self._put(instance.end_s, EventKind.BOUNDARY, instance, instance.version)

    def _start(self, instance: Instance) -> None:
        if instance.start_segment(self.now_s):
            assert instance.end_s is not None
            self._put(instance.end_s, EventKind.BOUNDARY, instance, instance.version)

"""A simulated queue and the engines that pull from it, by the live system's rule of admission."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush

from l4queue.policy.admission import (
    AdmissionBudget,
    AdmissionState,
    admission_budget,
    half_share,
    still_awaited,
)
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.wake import woken_of

__all__ = ("Pool", "budget_of")

Push = Callable[[SimRequest, Instance], None]


def budget_of(
    instance: Instance,
    *,
    pending_tokens: int,
    longest_tokens: int,
    num_waiting: float = 0.0,
    remaining_tokens: float | None = None,
) -> AdmissionBudget:
    """What an engine may take with so much prefill pending in it, the longest prompt of it so long."""
    state = AdmissionState(
        num_running=instance.num_requests,
        context_tokens=instance.held_tokens,
        pending_prefill_tokens=pending_tokens,
        kv_used_tokens=instance.kv_used_tokens,
        kv_capacity_tokens=instance.cost.kv_capacity_tokens,
        max_running=instance.cost.max_num_seqs,
        longest_prefill_tokens=longest_tokens,
        num_waiting=num_waiting,
        remaining_tokens=remaining_tokens,
    )
    return admission_budget(state, cost=instance.cost)


class Pool:
    """A queue in serving order and the engines that pull from it.

    What an engine may pull is decided by `l4queue.policy.admission`. `remaining_tokens`, where it is given, says
    what a running request still generates on average: then a long prompt waits for requests that end before it
    would.
    """

    __slots__ = ("_awaited", "_heap", "_remaining_tokens", "_score", "_sequence", "instances")

    def __init__(
        self,
        instances: Sequence[Instance],
        *,
        score: Callable[[SimRequest], float],
        remaining_tokens: Callable[[], float] | None = None,
    ) -> None:
        self.instances = list(instances)
        self._score = score
        self._remaining_tokens = remaining_tokens
        self._heap: list[tuple[float, int, SimRequest]] = []
        self._sequence = 0
        self._awaited: dict[Instance, frozenset[SimRequest]] = {}

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

    def put(self, request: SimRequest) -> None:
        """Queue a request by its score, ties in order of arrival."""
        if not self._heap:
            self._awaited.clear()
        self._sequence += 1
        heappush(self._heap, (self._score(request), self._sequence, request))

    def budget(self, instance: Instance) -> AdmissionBudget:
        """What the engine may take now: from here, or where nothing waits here, from a sibling stage."""
        return self._without_newcomers(self._budget(instance), instance)

    def has_room(self, instance: Instance) -> bool:
        """Whether the engine may take the head now."""
        budget, length_tokens = self._budget(instance), self.head.length
        if budget.refusal(length_tokens) is None:
            return True  # who is awaited makes no difference
        return self._without_newcomers(budget, instance).refusal(length_tokens) is None

    def _budget(self, instance: Instance) -> AdmissionBudget:
        return budget_of(
            instance,
            pending_tokens=instance.pending_tokens,
            longest_tokens=instance.longest_prefill_tokens,
            num_waiting=len(self._heap) / max(1, len(self.instances)),
            remaining_tokens=None if self._remaining_tokens is None else self._remaining_tokens(),
        )

    def _without_newcomers(self, budget: AdmissionBudget, instance: Instance) -> AdmissionBudget:
        if self._remaining_tokens is None or not self._heap or not budget.num_requests:
            return budget
        awaited = still_awaited(self._awaited.get(instance), instance.requests())
        self._awaited[instance] = awaited
        return budget.without_newcomers(awaited)

    def place(self, push: Push) -> None:
        """Hand out the head of the queue while some engine has room for it."""
        while self._heap:
            first = woken_of(self.instances, has_room=self.has_room)
            if first is None:
                return
            self._give(first, push)

    def pull(self, instance: Instance, push: Push) -> None:
        """Let one engine take from the head, half its share at a time, while it has room."""
        while self._heap and self.take(instance, push, budget=self.budget(instance)):
            pass

    def take(
        self,
        instance: Instance,
        push: Push,
        *,
        budget: AdmissionBudget,
        num_sharers: int | None = None,
        most: int | None = None,
    ) -> int:
        """Let one engine take from the head what its budget allows; how many it took."""
        share = half_share(len(self._heap), num_sharers=num_sharers or len(self.instances))
        share = share if most is None else min(share, most)
        num_taken = 0
        while num_taken < share and budget.refusal(self.head.length) is None:
            budget = budget.after(self.head.length)
            self._give(instance, push)
            num_taken += 1
        return num_taken

    def _give(self, instance: Instance, push: Push) -> None:
        self._awaited.pop(instance, None)
        push(heappop(self._heap)[2], instance)

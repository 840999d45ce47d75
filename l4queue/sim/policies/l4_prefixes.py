"""L4 where prompts have known content: one queue, placed by `policy.prefix_affinity`, and priced moves.

Length classes are left out: the cost of a place parts long prefills and crowded batches by itself, and keeps to
cached prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence

from l4queue.models import Plan
from l4queue.policy.admission import AdmissionBudget, unbounded_budget
from l4queue.policy.prefix_affinity import CandidateWorker, QueuedPrompt, place
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.policies.pool import budget_of
from l4queue.sim.policies.prefixes import Prefixes
from l4queue.sim.policies.views import worker_id
from l4queue.sim.policy import Fleet

__all__ = ("PrefixL4",)


class PrefixL4(L4):
    """One stage whose queue is placed by cost, with the escapes and running steals of L4."""

    _prefixes: Prefixes

    def __init__(self, options: L4Options, *, fixed: Plan | None = None) -> None:
        """`fixed` is a plan of one stage, as it would be without."""
        super().__init__(options, fixed=fixed or Plan.one_stage())
        self._waiting: list[tuple[float, int, SimRequest]] = []  # by serving order

    def attach(self, cluster: Fleet) -> None:
        """As L4, with knowledge of prefixes."""
        self._prefixes = Prefixes(cluster.instances, cost=cluster.cost)
        super().attach(cluster)
        self._by_id = {worker_id(instance): instance for instance in cluster.instances}

    @property
    def num_queued(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """Queue it, and see who takes what waits."""
        self.traffic.arrived(request)
        self._waiting.append((self.score_of(request), request.index, request))
        self._waiting.sort()
        self._place(now_s)

    def on_boundary(self, instance: Instance, now_s: float) -> None:
        """Something may have room now. What runs may leave before a prefill that comes."""
        self._place(now_s)
        self._escape(instance, now_s)

    def on_started(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """Their prefill is no longer due."""
        self._prefixes.started(requests)
        super().on_started(instance, requests, now_s)

    def on_tick(self, now_s: float) -> None:
        """Waits end."""
        self._place(now_s)
        super().on_tick(now_s)

    def _place(self, now_s: float) -> None:
        if not self._waiting:
            return
        prefixes = self._prefixes
        queue = (
            QueuedPrompt(
                request_id=str(request.index),
                length_tokens=request.length,
                waited_ms=(now_s - request.arrival_s) * 1000.0,
                held_tokens=prefixes.held_by_all(request),
            )
            for _, _, request in self._waiting
        )
        choices = place(
            queue,
            [self._candidate(instance) for instance in self.cluster.instances],
            expected_output_tokens=self.traffic.outputs.mean_tokens,
            cost=self.cluster.cost,
        )
        chosen = {int(c.request_id): self._by_id[c.worker_id] for c in choices if c.worker_id is not None}
        if not chosen:
            return
        taken = [entry[2] for entry in self._waiting if entry[2].index in chosen]
        self._waiting = [entry for entry in self._waiting if entry[2].index not in chosen]
        for request in taken:
            instance = chosen[request.index]
            prefixes.taken(request, prefixes.held_tokens(request, instance))
            self.cluster.push(request, instance)

    def _candidate(self, instance: Instance) -> CandidateWorker:
        return CandidateWorker(
            worker_id=worker_id(instance),
            num_running=instance.num_requests,
            context_tokens=instance.held_tokens,
            due_ms=self._prefixes.due_ms(instance),
            budget=self._budget(instance),
        )

    def _budget(self, instance: Instance) -> AdmissionBudget:
        """What an engine may take; without late binding as much as it has slots."""
        if self._has["late-binding"]:
            due = self._prefixes.due_tokens(instance)
            return budget_of(instance, pending_tokens=sum(due), longest_tokens=max(due, default=0))
        free = instance.cost.max_num_seqs - instance.num_requests
        return unbounded_budget(free, reason="all slots taken", is_idle=False)

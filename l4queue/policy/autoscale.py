"""The scaling signal: work at hand against the capacity of the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from l4queue.models import WorkerLoad

__all__ = ("FleetDemand", "demand_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDemand:
    """Waiting and running work, and the capacity for it: KV cache in tokens, slots in requests."""

    tokens: float
    requests: int
    capacity_tokens: int
    capacity_requests: int
    num_workers: int

    @property
    def ratio(self) -> float | None:
        """Work over capacity, by tokens or by requests, whichever is scarcer; above 1 something has to wait.

        None without workers.
        """
        ratios = []
        if self.capacity_tokens:
            ratios.append(self.tokens / self.capacity_tokens)
        if self.capacity_requests:
            ratios.append(self.requests / self.capacity_requests)
        return max(ratios, default=None)

    def workers(self, *, last_known: FleetDemand | None = None) -> float:
        """How many workers the work would fill.

        Without workers it is measured by those of `last_known`; where none was ever seen, one for any work.
        """
        ratio = self.ratio
        if ratio is not None:
            return ratio * self.num_workers
        if last_known is None or last_known.ratio is None:
            return 1.0 if self.requests else 0.0
        return replace(last_known, tokens=self.tokens, requests=self.requests).workers()


def demand_of(workers: Sequence[WorkerLoad], *, queued_tokens: float, queued_requests: int) -> FleetDemand:
    """Sum up: what waits anywhere, and what the workers run. A worker that leaves adds work but no capacity."""
    staying = [worker for worker in workers if not worker.is_draining]
    return FleetDemand(
        tokens=queued_tokens + sum(worker.context_tokens for worker in workers),
        requests=queued_requests + sum(worker.num_running for worker in workers),
        capacity_tokens=sum(worker.kv_capacity_tokens for worker in staying),
        capacity_requests=sum(worker.max_running for worker in staying),
        num_workers=len(staying),
    )

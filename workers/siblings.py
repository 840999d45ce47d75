"""What a worker knows of its siblings: loads of all stages as of the last look, for the decision to steal."""

from __future__ import annotations

from l4queue.policy.cost import StepCost
from l4queue.policy.loads import StageLoad, stage_load
from l4queue.protocol.overview import Overview

__all__ = ("expected_output_tokens", "stage_loads")

_FIRST_GUESS_TOKENS = 128.0


def expected_output_tokens(overview: Overview) -> float:
    """Mean output of the requests finished so far; a guess before the first."""
    done = overview.counts.get("done", 0)
    return overview.counts.get("output_tokens", 0) / done if done else _FIRST_GUESS_TOKENS


def stage_loads(overview: Overview, *, cost: StepCost) -> list[StageLoad]:
    """The load of every stage of the plan, by what its workers published and what waits for it."""
    expected = expected_output_tokens(overview)
    loads = []
    for index in range(len(overview.plan.stages)):
        queue = overview.queues.get(str(index))
        loads.append(
            stage_load(
                index,
                [worker for worker in overview.workers if worker.stage == index],
                queued_requests=queue.num_requests if queue else 0,
                queued_tokens=queue.tokens if queue else 0,
                expected_output_tokens=expected,
                cost=cost,
            )
        )
    return loads

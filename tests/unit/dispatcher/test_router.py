"""Work that a dispatcher expects of outputs, before and after the first request has ended."""

from __future__ import annotations

import json

from dispatcher.routing.router import Router
from l4queue.config import Settings
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.observe.overview import Overview, QueueView
from l4queue.policy.output_lengths import FIRST_GUESS_TOKENS, OutputLengths

PLAN = Plan(
    version=1,
    stages=(
        StagePlan(low_tokens=0, high_tokens=512, num_workers=1, worker_ids=("a",)),
        StagePlan(low_tokens=512, high_tokens=None, num_workers=1, worker_ids=("b",)),
    ),
)


def drain_ms(counts: dict[str, int]) -> float:
    """How long the stage of a short prompt takes, as `explain` tells it."""
    overview = Overview(
        now_ms=0,
        plan=PLAN,
        workers=(WorkerLoad(worker_id="a", stage=0), WorkerLoad(worker_id="b", stage=1)),
        costs=(None, None),
        prices=(),
        queues={"0": QueueView(num_requests=9, tokens=900)},
        inbox=0,
        counts=counts,
    )
    router = Router(Settings())
    router.follow(PLAN)
    router.see(overview, held={})
    found = json.loads(router.place(100, submitted_ms=0, priority=0).why)["drain_ms"]
    assert isinstance(found, float)
    return found


def test_before_the_first_output_the_guess_is_that_of_the_workers() -> None:
    """The same decision in dispatcher, worker and simulator begins with the same number."""
    assert OutputLengths().mean_tokens == FIRST_GUESS_TOKENS == 256
    assert (
        drain_ms({}) == drain_ms({"done": 2, "output_tokens": 512}) > drain_ms({"done": 2, "output_tokens": 256})
    )

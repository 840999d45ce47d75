"""The stage of a new worker."""

from __future__ import annotations

from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.policy.loads import StageLoad
from l4queue.policy.newcomer import stage_for_newcomer


def test_a_newcomer_joins_where_workers_are_missing_else_where_the_queue_is_longest() -> None:
    """Short of planned workers first (draining ones are absent), then the longest drain; ties to the lower."""
    plan = Plan(
        version=1,
        stages=(
            StagePlan(low_tokens=0, high_tokens=1000, num_workers=2, worker_ids=("w00", "w01")),
            StagePlan(low_tokens=1000, high_tokens=None, num_workers=2, worker_ids=("w02", "w03")),
        ),
    )
    full = [WorkerLoad(worker_id=f"w{i}", stage=i // 2) for i in range(4)]
    queues = [StageLoad(stage=0, num_workers=2, drain_ms=10.0), StageLoad(stage=1, num_workers=2, drain_ms=20.0)]

    assert stage_for_newcomer(plan, full[:3]).stage == 1
    draining = [*full[:3], WorkerLoad(worker_id="w3", stage=1, is_draining=True)]
    assert stage_for_newcomer(plan, draining).stage == 1
    assert stage_for_newcomer(plan, full, queues=queues).stage == 1
    assert stage_for_newcomer(plan, full).stage == 0
    assert stage_for_newcomer(plan, []).stage == 0
    assert stage_for_newcomer(Plan.one_stage(), full).reason == "one stage"

"""The planner: a snapshot of the system goes in, a decision to keep or to publish comes out. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from l4queue.config import Settings, default_of
from l4queue.cost.step import StepCost
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.plan_json import split_of
from l4queue.planning.assign import assign, scale_counts
from l4queue.planning.histogram import Buckets, Demand, with_backlog, with_unfinished
from l4queue.planning.partition import Partition, PartitionProblem
from l4queue.planning.proposals import proposals
from l4queue.planning.steady_state import PartitionSettings

__all__ = (
    "Candidate",
    "Decision",
    "PlannerSettings",
    "Replay",
    "Snapshot",
    "expected_demand",
    "is_young",
    "plan",
)


class Replay(Protocol):
    """Replays of recent traffic under a plan, for shadow scoring."""

    @property
    def tells_content(self) -> bool:
        """Whether it knows what prompts have in common: then it can tell what prefix affinity is worth."""

    def score(self, plan: Plan, /) -> float:
        """Predicted objective; less is better."""

    def sure_gain(self, plan: Plan, against: Plan, /) -> float:
        """Share of the objective of `against` that `plan` saves beyond chance; negative where that is unsure."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """All that a decision depends on. `backlog` holds pairs of length bucket and waiting requests.

    `changed_ms` is when the traffic changed last, or when it was seen first.
    """

    now_ms: int
    plan: Plan
    loads: tuple[WorkerLoad, ...]
    demand: Demand
    backlog: tuple[tuple[int, int], ...] = ()
    cost: StepCost
    buckets: Buckets
    changed_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    """When a plan is worth publishing, and what it is to minimise.

    `min_gain` is the least saving against the present plan, as a share of its objective, and
    `move_gain` is added to it in proportion to the share of workers that would move: the switching cost.
    Classes that save less than `min_class_gain` of one stage do not pay, and each further stage must save
    `min_stage_gain`: what the closed form leaves out, such as pooling, favours few. `patience` widens the bounds
    on long requests for the plan in force, so that it is not thrown out by a bound it has just crossed.
    """

    min_gain: float = default_of("plan_min_gain")
    min_life_ms: int = round(1000 * default_of("plan_min_life_s"))
    move_gain: float = 0.02
    min_class_gain: float = 0.02
    min_stage_gain: float = 0.03
    patience: float = 1.15
    partition: PartitionSettings = field(default_factory=PartitionSettings)

    @classmethod
    def of(cls, settings: Settings, *, partition: PartitionSettings | None = None) -> PlannerSettings:
        """From the deployment's settings; `max_stages` comes from there."""
        base = partition or PartitionSettings()
        return cls(
            min_gain=settings.plan_min_gain,
            min_life_ms=round(settings.plan_min_life_s * 1000),
            partition=replace(base, max_stages=settings.max_stages),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan that was considered: `objective` by the closed form, `scored` by the simulator if it was asked."""

    stages: tuple[StagePlan, ...]
    objective: float
    scored: float | None
    num_moves: int
    is_current: bool
    prefix_affinity: bool = False

    @property
    def value(self) -> float:
        """Figure by which candidates are compared; less is better."""
        return self.objective if self.scored is None else self.scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Publish `plan`, or keep it as it is; and what each candidate would have given."""

    publish: bool
    plan: Plan
    reason: str
    candidates: tuple[Candidate, ...] = ()


def plan(snapshot: Snapshot, settings: PlannerSettings, *, replay: Replay | None = None) -> Decision:
    """Decide. The same snapshot gives the same decision, byte for byte.

    Candidates are the best partition for each number of stages and the present plan, with its workers in their
    old proportions where some came or went; where `replay` tells content, one stage with prefix affinity, too. The
    least objective wins, by `replay` if given, else by the closed form; one stage wins unless others save
    `min_class_gain`. It is published if it saves enough against the present plan and that has lived its time; at
    once if workers came or went, or if there is no plan yet.

    No workers: keep. No traffic: keep, or give new workers a place. One worker: one stage.
    """
    present = snapshot.plan
    workers = tuple(sorted((w for w in snapshot.loads if not w.is_draining), key=lambda w: w.worker_id))
    if not workers:
        return Decision(publish=False, plan=present, reason="no workers")
    has_changed = {w.worker_id for w in workers} != {i for s in present.stages for i in s.worker_ids}
    demand = expected_demand(snapshot)
    if demand.is_empty:
        return _without_traffic(snapshot, workers, has_changed=has_changed)
    problem = PartitionProblem(
        demand, len(workers), buckets=snapshot.buckets, cost=snapshot.cost, settings=settings.partition
    )
    current = _current(snapshot, problem, workers, settings=settings, replay=replay)
    parts = _partitions(problem, is_replayed=replay is not None)
    with_affinity = []
    if replay is not None and replay.tells_content:  # before the others: held against it, most are ended early
        one = problem.judge((), (len(workers),))
        with_affinity = [_candidate(one, present, workers, replay=replay, prefix_affinity=True)]
    fresh = [*(_candidate(p, present, workers, replay=replay) for p in parts), *with_affinity]
    best = _best(fresh, settings=settings)
    candidates = tuple(fresh) if current is None else (*fresh, current)
    if has_changed or current is None:
        chosen, reason = _after_change(best, current, settings=settings)
        return _publish(snapshot, chosen, candidates, problem, reason=reason)
    why_kept = _why_kept(best, current, snapshot, settings, replay=replay)
    if why_kept is not None:
        return Decision(publish=False, plan=present, reason=why_kept, candidates=candidates)
    return _publish(snapshot, best, candidates, problem, reason=f"gain {_gain(best, current):.1%}")


def _why_kept(
    best: Candidate, current: Candidate, snapshot: Snapshot, settings: PlannerSettings, *, replay: Replay | None
) -> str | None:
    """Why the present plan stays; None where `best` should replace it."""
    present, gain = snapshot.plan, _gain(best, current)
    if _key(best) == _key(present):
        return "the present plan is best"
    needed = settings.min_gain + settings.move_gain * best.num_moves / len(snapshot.loads)
    if gain <= needed:
        return f"gain {gain:.1%} does not exceed {needed:.1%}"
    if is_young(snapshot, settings):
        return f"gain {gain:.1%}, but the plan is only {snapshot.now_ms - present.created_ms} ms old"
    if replay is None or not present.details.get("is_replayed"):
        return None
    sure = replay.sure_gain(_plan_of(best, present), _plan_of(current, present))
    return None if sure > 0.0 else f"gain {gain:.1%} may be chance"


def is_young(snapshot: Snapshot, settings: PlannerSettings) -> bool:
    """Whether the plan has not lived its time; one that was made before traffic changed has.

    So has one of the future: the clock has gone back since.
    """
    created_ms = snapshot.plan.created_ms
    is_fresh = 0 <= snapshot.now_ms - created_ms < settings.min_life_ms
    return is_fresh and created_ms > snapshot.changed_ms


def _partitions(problem: PartitionProblem, *, is_replayed: bool) -> list[Partition]:
    """The best by the closed form, and what else a replay may find better; each split once."""
    parts = [*problem.candidates(), *(proposals(problem) if is_replayed else ())]
    return list({tuple((s.low_tokens, s.num_workers) for s in p.stages): p for p in reversed(parts)}.values())[
        ::-1
    ]


def expected_demand(snapshot: Snapshot) -> Demand:
    """Expected work: the rates seen, the steps that running requests still make, the backlog."""
    running = sum(load.num_running for load in snapshot.loads)
    demand = with_unfinished(snapshot.demand, running)
    return with_backlog(demand, snapshot.backlog, buckets=snapshot.buckets)


def _without_traffic(snapshot: Snapshot, workers: tuple[WorkerLoad, ...], *, has_changed: bool) -> Decision:
    """Nothing to learn from: the ranges stay; workers that came or went are fitted in."""
    present = snapshot.plan
    if not has_changed:
        return Decision(publish=False, plan=present, reason="no traffic")
    if len(workers) < len(present.stages) or not any(s.num_workers for s in present.stages):
        stages: Sequence[StagePlan] = Plan.one_stage(num_workers=len(workers)).stages
    else:
        counts = scale_counts([s.num_workers for s in present.stages], len(workers))
        stages = [replace(s, num_workers=n) for s, n in zip(present.stages, counts, strict=True)]
    reason = "workers changed, no traffic"
    new = Plan(
        version=present.version + 1,
        stages=assign(stages, workers, current=present).stages,
        reason=reason,
        created_ms=snapshot.now_ms,
        prefix_affinity=present.prefix_affinity,
    )
    return Decision(publish=True, plan=new, reason=reason)


def _current(
    snapshot: Snapshot,
    problem: PartitionProblem,
    workers: tuple[WorkerLoad, ...],
    *,
    settings: PlannerSettings,
    replay: Replay | None,
) -> Candidate | None:
    """The present plan as a candidate, judged with patience; None when it cannot go on as it is."""
    present = snapshot.plan
    bounds = [snapshot.buckets.edge_near(s.low_tokens) for s in present.stages[1:]]
    edges = [0, *bounds, len(snapshot.buckets)]
    if present.version == 0 or len(workers) < len(present.stages):
        return None
    if any(a >= b for a, b in itertools.pairwise(edges)):
        return None
    counts = scale_counts([s.num_workers for s in present.stages], len(workers))
    old = settings.partition
    patient = replace(
        old,
        long_bound=old.long_bound * settings.patience,
        p99_bound=old.p99_bound * settings.patience,
        max_rho=1.0 - (1.0 - old.max_rho) / settings.patience,
    )
    judged = problem.under(patient).judge([s.low_tokens for s in present.stages[1:]], counts)
    affinity = present.prefix_affinity
    return _candidate(judged, present, workers, replay=replay, keep_bounds=True, prefix_affinity=affinity)


def _candidate(
    partition: Partition,
    present: Plan,
    workers: tuple[WorkerLoad, ...],
    *,
    replay: Replay | None,
    keep_bounds: bool = False,
    prefix_affinity: bool = False,
) -> Candidate:
    stages = [
        StagePlan(low_tokens=s.low_tokens, high_tokens=s.high_tokens, num_workers=s.num_workers)
        for s in partition.stages
    ]
    if keep_bounds:
        stages = [replace(p, num_workers=s.num_workers) for p, s in zip(present.stages, stages, strict=True)]
    assignment = assign(stages, workers, current=present)
    unscored = Candidate(
        stages=assignment.stages,
        objective=partition.objective,
        scored=None,
        num_moves=len(assignment.moved),
        is_current=keep_bounds,
        prefix_affinity=prefix_affinity,
    )
    return unscored if replay is None else replace(unscored, scored=replay.score(_plan_of(unscored, present)))


def _best(candidates: Sequence[Candidate], *, settings: PlannerSettings) -> Candidate:
    """Least value; fewer stages unless more save enough, and at least one stage must be beaten clearly.

    One stage comes before the same with prefix affinity.
    """
    ordered = sorted(candidates, key=lambda c: (len(c.stages), c.prefix_affinity))
    best = ordered[0]
    for other in ordered[1:]:
        more = len(other.stages) - len(best.stages)
        if _gain(other, best) > more * settings.min_stage_gain:
            best = other
    one = ordered[0]
    if len(one.stages) == 1 and _gain(best, one) < settings.min_class_gain:
        return one
    return best


def _after_change(
    best: Candidate, current: Candidate | None, *, settings: PlannerSettings
) -> tuple[Candidate, str]:
    """Workers came or went: something is published, but new ranges only where they gain enough."""
    if current is None:
        return best, "first plan, or the present one does not fit the workers"
    gain = _gain(best, current)
    if gain <= settings.min_gain:
        return current, "workers changed, ranges kept"
    return best, f"workers changed, gain {gain:.1%}"


def _gain(best: Candidate, against: Candidate) -> float:
    """Share that `best` saves: 1 against an infinite objective, 0 between two infinite ones."""
    if best.value == against.value:
        return 0.0
    if against.value == float("inf"):
        return 1.0
    return 1.0 - best.value / against.value if against.value > 0.0 else -float("inf")


def _plan_of(one: Candidate, present: Plan) -> Plan:
    return replace(present, stages=one.stages, prefix_affinity=one.prefix_affinity, objective=None, details={})


def _key(one: Candidate | Plan) -> tuple[bool, list[tuple[int, int]]]:
    """The part of a plan by which it differs from others; its workers do not count."""
    return one.prefix_affinity, [(s.low_tokens, s.num_workers) for s in one.stages]


def _publish(
    snapshot: Snapshot,
    chosen: Candidate,
    candidates: tuple[Candidate, ...],
    problem: PartitionProblem,
    *,
    reason: str,
) -> Decision:
    predicted = problem.judge([s.low_tokens for s in chosen.stages[1:]], [s.num_workers for s in chosen.stages])
    finite = [v for v in (chosen.objective, predicted.objective_one_stage) if v < float("inf")]
    reason = f"prefix affinity: {reason}" if chosen.prefix_affinity else reason
    new = Plan(
        version=snapshot.plan.version + 1,
        stages=chosen.stages,
        reason=reason,
        created_ms=snapshot.now_ms,
        objective=chosen.objective if chosen.objective < float("inf") else None,
        objective_one_stage=predicted.objective_one_stage if len(finite) == 2 else None,
        prefix_affinity=chosen.prefix_affinity,
        details={
            "demand_scale": round(problem.demand_scale, 6),
            "num_moves": chosen.num_moves,
            "is_replayed": chosen.scored is not None,
            # the closed form would refuse it: a replay found it good, and only a replay may take it back
            "is_proven": chosen.prefix_affinity
            or (chosen.scored is not None and chosen.objective == float("inf")),
            "stages": [
                {
                    "rho": round(s.rho, 6),
                    "step_ms": _finite(s.step_ms),
                    "ttft_ms": _finite(s.ttft_ms),
                    "in_flight": _finite(s.in_flight),
                }
                for s in predicted.stages
            ],
            "candidates": [
                {
                    **split_of(c.stages, prefix_affinity=c.prefix_affinity),
                    "objective": _finite(c.objective),
                    "scored": None if c.scored is None else _finite(c.scored),
                    "is_current": c.is_current,
                }
                for c in candidates
            ],
        },
    )
    return Decision(publish=True, plan=new, reason=reason, candidates=candidates)


def _finite(value: float) -> float | None:
    """JSON has no infinity: None stands for it."""
    return round(value, 6) if value < float("inf") else None

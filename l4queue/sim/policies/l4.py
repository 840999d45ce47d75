"""L4 in the simulator: planner, routing, pulling, stealing, hand-over and refinement of the live system."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf

from l4queue.config import default_of
from l4queue.errors import ConfigError
from l4queue.models import Plan
from l4queue.planning.partition import PartitionProblem
from l4queue.planning.planner import Decision, PlannerSettings, Snapshot, expected_demand, plan
from l4queue.planning.refine import refine
from l4queue.planning.steady_state import Objective, PartitionSettings
from l4queue.policy.admission import AdmissionBudget
from l4queue.policy.handover import decide_handover, first_watch, least_loaded, look_again_at, next_stage
from l4queue.policy.loads import EARLY_NEWS_S, StageLoad, prefill_ahead_ms, stage_load
from l4queue.policy.queue_order import ageing_tokens_per_s
from l4queue.policy.route import route
from l4queue.policy.steal import Steal, StealLimits, steal_waiting
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.l4_escapes import Escapes
from l4queue.sim.policies.l4_running_steals import PendingMove, RunningSteals
from l4queue.sim.policies.l4_traffic import Traffic
from l4queue.sim.policies.pool import Pool
from l4queue.sim.policies.prefixes import Prefixes
from l4queue.sim.policies.views import load_of, score_of, with_copies, with_engines, worker_id
from l4queue.sim.policy import Fleet, Policy
from l4queue.sim.wake import backlog_of

__all__ = ("INGREDIENTS", "L4", "L4Options")

_NEWS_S = EARLY_NEWS_S  # age of a worker's news when something comes to another stage
INGREDIENTS = (
    *("hand-over", "stealing", "running-steals", "escape"),
    *("classes", "refinement", "shadow", "skew", "skew-in-planner"),
    *("late-binding", "finish-first", "affinity", "order"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class L4Options:
    """Switches of L4 and its planning periods. `without` names ingredients that are switched off."""

    objective: str = "balanced"
    slo_ttft_ms: float = default_of("slo_ttft_ms")
    slo_tpot_ms: float = default_of("slo_tpot_ms")
    without: frozenset[str] = frozenset()
    replan_s: float = default_of("replan_interval_s")
    refine_s: float = default_of("refine_interval_s")
    half_life_s: float = default_of("demand_half_life_s")
    min_life_s: float = default_of("plan_min_life_s")
    min_gain: float = default_of("plan_min_gain")
    steal: StealLimits = field(default_factory=StealLimits)
    ageing_tokens_per_s: float | None = None

    @classmethod
    def checked(cls, *, objective: str, without: frozenset[str]) -> L4Options:
        """Options from the command line; ConfigError names what is unknown."""
        known = [o.value for o in Objective]
        if objective not in known:
            raise ConfigError(f"--objective: {objective!r} is unknown; choose from {', '.join(known)}")
        for name in sorted(without):
            if name not in INGREDIENTS:
                raise ConfigError(f"--without: {name!r} is unknown; choose from {', '.join(INGREDIENTS)}")
        return cls(objective=objective, without=without)


Prove = Callable[["L4", Snapshot, PlannerSettings], tuple[Decision, bool]]
"""`l4queue.sim.prove.prove_recent`: decides with a replay of recent requests, and says whether there was one."""


class L4(Policy):
    """Stages by length with late binding, planned online from what has been seen so far."""

    name = "l4"
    tick_s = 1.0
    _prefixes: Prefixes | None = None

    def __init__(self, options: L4Options, *, fixed: Plan | None = None, prove: Prove | None = None) -> None:
        """`fixed` is served without any replanning; `prove` turns shadow scoring on."""
        self.options = options
        self._fixed = fixed
        self._prove = prove if "shadow" not in options.without else None
        self.plans: list[tuple[float, Plan]] = []
        self.end_s = 0.0
        self._has = {name: name not in options.without for name in INGREDIENTS}
        self.traffic = Traffic(half_life_s=options.half_life_s)
        self._refined_s = 0.0
        self._news: list[StageLoad] = []
        self._news_s = -_NEWS_S

    def attach(self, cluster: Fleet) -> None:
        """Begin with one stage for everybody."""
        super().attach(cluster)
        rate = ageing_tokens_per_s(cluster.cost, given=self.options.ageing_tokens_per_s)
        self.score_of = partial(score_of, ageing_tokens_per_s=rate if self._has["order"] else inf)
        knows_skew = self._has["skew-in-planner"]
        self._planner_cost = cluster.cost if knows_skew else replace(cluster.cost, sigma_ms=0.0)
        self._running = RunningSteals(
            cost=cluster.cost,
            price=lambda: cluster.price,
            limits=self.options.steal,
            copies_due_ms=cluster.copies_due_ms,
        )
        self._escapes = Escapes(
            cluster.instances,
            cost=cluster.cost,
            price=lambda: cluster.price,
            limits=self.options.steal,
            copies_due_ms=cluster.copies_due_ms,
            ahead_ms=self._ahead_ms,
            expected_remaining=self.traffic.outputs.expected_remaining,
            rng=cluster.rng,
            prefixes=self._prefixes,
        )
        self._settings = PlannerSettings(
            min_gain=self.options.min_gain,
            min_life_ms=round(self.options.min_life_s * 1000),
            partition=PartitionSettings(
                objective=Objective(self.options.objective),
                slo_ttft_ms=self.options.slo_ttft_ms,
                slo_tpot_ms=self.options.slo_tpot_ms,
                max_stages=4 if self._has["classes"] else 1,
                move_price=cluster.price,
                moves_requests=self._has["hand-over"],
            ),
        )
        self._adopt(with_engines(self._fixed or Plan.one_stage(), cluster.instances))

    @property
    def num_queued(self) -> int:
        """Requests waiting in stage queues."""
        return sum(map(len, self._pools))

    # ---------------------------------------------------------------- requests

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """Route by the prompt's length."""
        self.traffic.arrived(request)
        stage = route(request.prompt_tokens, self.plan).stage
        request.stage = stage
        pool = self._pools[stage]
        if not self._has["late-binding"]:
            self.cluster.push(request, min(pool.instances, key=backlog_of))
            return
        pool.put(request)
        if len(pool) == 1:
            pool.place(self.cluster.push)
            if len(pool) and self._has["stealing"] and len(self._pools) > 1:
                self._wake_thieves(stage)

    def on_boundary(self, instance: Instance, now_s: float) -> None:
        """Pull from the own queue; steal when it is empty. What runs may leave before a prefill that comes."""
        pool = self._pools[instance.stage]
        pool.pull(instance, self.cluster.push)
        if not len(pool) and self._has["stealing"] and len(self._pools) > 1:
            self._steal(instance)
        self._escape(instance, now_s)

    def _escape(self, instance: Instance, now_s: float) -> None:
        if self._has["escape"]:
            for request, target in self._escapes.moves(instance, now_s):
                self.cluster.ask_back(request, instance, PendingMove(target=target, is_steal=False))

    def on_started(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """Watch for the end of the stage's range."""
        for request in requests:
            self._watch(instance, request, has_moved=False)

    def on_finished(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """Learn from lengths that are known now."""
        self.end_s = now_s
        self.traffic.finished(requests)
        self._running.forget(requests)
        self._escapes.forget(requests)

    def on_alarm(self, instance: Instance, request: SimRequest, now_s: float) -> None:
        """It has outgrown its stage: move it if that pays, else look again when it has grown much further."""
        if instance.stage + 1 >= len(self._pools):
            return
        length = instance.length_of(request)
        stage = next_stage(instance.stage, length, self.plan)
        others = {worker_id(i): i for i in self._pools[stage].instances}
        copies_due_ms = self.cluster.copies_due_ms
        here = with_copies(load_of(instance), copies_due_ms(instance))
        loads = [with_copies(load_of(i), copies_due_ms(i)) for i in others.values()]
        there = least_loaded(loads, cost=self.cluster.cost)
        decision = decide_handover(
            length,
            high_tokens=self.plan.stages[instance.stage].high_tokens,
            expected_remaining_tokens=self.traffic.outputs.expected_remaining(length - request.prompt_tokens),
            here=here,
            there=there,
            cost=self.cluster.cost,
            price=self.cluster.price,
            ahead_here_ms=self._ahead_ms(instance.pending_tokens, instance.stage),
            ahead_there_ms=self._ahead_ms(there.pending_prefill_tokens if there else 0, stage),
        )
        if decision.is_move and there is not None:
            self.cluster.ask_back(request, instance, PendingMove(target=others[there.worker_id], is_steal=False))
        else:
            instance.watch(request, length_tokens=look_again_at(length))

    def _ahead_ms(self, pending_tokens: int, stage: int) -> float:
        """Prefill before what an engine with so much of its own runs or would run."""
        pool = self._pools[stage]
        return prefill_ahead_ms(
            pending_tokens,
            queued_requests=len(pool),
            queued_tokens=pool.queued_tokens,
            num_workers=len(pool.instances),
            cost=self.cluster.cost,
        )

    def on_removed(self, instance: Instance, request: SimRequest, tag: object, now_s: float) -> None:
        """Released: on to its new engine."""
        assert isinstance(tag, PendingMove)
        request.stage = tag.target.stage
        request.watch_tokens = None
        send = self.cluster.steal if tag.is_steal else self.cluster.send
        send(request, tag.target)
        self._watch(tag.target, request, has_moved=True)

    def _watch(self, instance: Instance, request: SimRequest, *, has_moved: bool) -> None:
        """Weigh a hand-over of it when it has grown that far. A new plan weighs all anew, as live."""
        high_tokens = self.plan.stages[instance.stage].high_tokens if self._has["hand-over"] else None
        watch_tokens = first_watch(instance.length_of(request), high_tokens=high_tokens, has_moved=has_moved)
        if watch_tokens is not None:
            instance.watch(request, length_tokens=watch_tokens)

    # ---------------------------------------------------------------- stealing

    def _wake_thieves(self, stage: int) -> None:
        for instance in self.cluster.instances:
            if instance.end_s is None and instance.stage != stage and not len(self._pools[instance.stage]):
                self._steal(instance)

    def _steal(self, thief: Instance) -> None:
        """Take from sibling stages while that pays; half a share at a time, as from the own queue."""
        while any(len(pool) for pool in self._pools):
            own = self._pools[thief.stage]
            budget = own.budget(thief)
            if self._what_to_steal(thief, budget, self._recent_loads()).stage is None:
                return
            decision = self._what_to_steal(thief, budget, self._stage_loads())
            if decision.stage is None:
                return
            if not self._pools[decision.stage].take(
                thief,
                self.cluster.push_stolen,
                budget=budget,
                num_sharers=len(own.instances),
                most=decision.num_requests,
            ):
                return

    def _what_to_steal(self, thief: Instance, budget: AdmissionBudget, loads: Sequence[StageLoad]) -> Steal:
        return steal_waiting(
            load_of(thief),
            own=replace(loads[thief.stage], queued_requests=0, queued_tokens=0),
            siblings=loads,
            head_tokens={i: pool.head.length for i, pool in enumerate(self._pools) if len(pool)},
            max_requests=budget.num_requests,
            expected_output_tokens=self.traffic.outputs.mean_tokens,
            cost=self.cluster.cost,
            limits=self.options.steal,
        )

    def _recent_loads(self) -> list[StageLoad]:
        """As a worker has them before it looks closely: of a moment ago."""
        if self.cluster.now_s >= self._news_s + _NEWS_S:
            self._news, self._news_s = self._stage_loads(), self.cluster.now_s
        return self._news

    def _steal_running(self, now_s: float) -> None:
        """Engines with nothing to pull anywhere ask overloaded ones for requests that run."""
        moves = self._running.moves(
            self.cluster.instances,
            num_waiting=self.num_queued,
            now_s=now_s,
            expected_remaining=self.traffic.outputs.expected_remaining,
        )
        for request, source, target in moves:
            self.cluster.ask_back(request, source, PendingMove(target=target, is_steal=True))

    def _stage_loads(self) -> list[StageLoad]:
        return [
            stage_load(
                index,
                [load_of(instance) for instance in pool.instances],
                queued_requests=len(pool),
                queued_tokens=pool.queued_tokens,
                expected_output_tokens=self.traffic.outputs.mean_tokens,
                cost=self.cluster.cost,
            )
            for index, pool in enumerate(self._pools)
        ]

    # ---------------------------------------------------------------- planning

    def on_tick(self, now_s: float) -> None:
        """Replan and refine when due; give idle engines another chance."""
        self.end_s = now_s
        if self._fixed is not None:
            pass
        elif now_s - self.traffic.learned_s >= self.options.replan_s or self._is_early(now_s):
            self._replan(now_s)
        elif self._has["refinement"] and now_s - self._refined_s >= self.options.refine_s:
            self._refine(now_s)
        for stage, pool in enumerate(self._pools):
            pool.place(self.cluster.push)
            if len(pool) and self._has["stealing"]:
                self._wake_thieves(stage)
        if self._has["running-steals"]:
            self._steal_running(now_s)

    def _is_early(self, now_s: float) -> bool:
        there = sum(instance.num_requests for instance in self.cluster.instances) + self.num_queued
        return self.traffic.is_early_round(now_s, num_unfinished=there, cost=self._planner_cost)

    def _replan(self, now_s: float) -> None:
        self.traffic.learn(self.cluster.instances, now_s, cost=self.cluster.cost)
        decision = self._decide(self.snapshot(now_s))
        if decision.publish:
            self._adopt(decision.plan)

    def snapshot(self, now_s: float) -> Snapshot:
        """All that the planner may know now."""
        return Snapshot(
            now_ms=round(now_s * 1000),
            plan=self.plan,
            loads=tuple(load_of(instance) for instance in self.cluster.instances),
            demand=self.traffic.counts.demand(),
            backlog=self._backlog(),
            cost=self._planner_cost,
            buckets=self.traffic.buckets,
            changed_ms=round(self.traffic.learned.begun_s * 1000),
        )

    def _decide(self, snapshot: Snapshot) -> Decision:
        """By the closed form; with shadow scoring, what it proposes is published only after a replay."""
        if self._prove is None:
            return plan(snapshot, self._settings)
        decision, was_replayed = self._prove(self, snapshot, self._settings)
        if was_replayed:
            self.traffic.decided()
        return decision

    def _refine(self, now_s: float) -> None:
        self._refined_s = now_s
        if len(self._pools) < 2 or self.traffic.counts.observed_s <= 0.0:
            return
        problem = PartitionProblem(
            expected_demand(self.snapshot(now_s)),
            len(self.cluster.instances),
            buckets=self.traffic.buckets,
            cost=self._planner_cost,
            settings=self._settings.partition,
        )
        refined = refine(self.plan, problem).plan
        if refined is not None:
            self._adopt(refined)

    def _backlog(self) -> tuple[tuple[int, int], ...]:
        found: dict[int, int] = {}
        for request in self._queued():
            bucket = self.traffic.buckets.index(request.length)
            found[bucket] = found.get(bucket, 0) + 1
        return tuple(sorted(found.items()))

    def _queued(self) -> Iterable[SimRequest]:
        return (request for pool in self._pools for request in pool.queued())

    def _adopt(self, new: Plan) -> None:
        """Serve by a plan: engines change their queue, waiting requests are routed anew."""
        waiting = list(self._queued()) if self.plans else []
        self.plan = new
        self.plans.append((self.end_s, new))
        by_id = {worker_id(instance): instance for instance in self.cluster.instances}
        self._pools, self._news_s = [], -_NEWS_S
        for index, stage in enumerate(new.stages):
            members = [by_id[name] for name in stage.worker_ids]
            for instance in members:
                instance.stage = index
            self._pools.append(self._make_pool(members))
        for request in waiting:
            request.stage = route(request.length, new).stage
            self._pools[request.stage].put(request)
        for instance in self.cluster.instances:
            for request, _ in list(instance.decoding_lengths()):
                self._watch(instance, request, has_moved=False)

    def _make_pool(self, members: Sequence[Instance]) -> Pool:
        outputs = self.traffic.outputs
        remaining_tokens = (lambda: outputs.mean_tokens) if self._has["finish-first"] else None
        return Pool(members, score=self.score_of, remaining_tokens=remaining_tokens)

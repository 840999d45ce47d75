"""One view of the deployment: plan, workers, queues, totals. Read by the CLI, the planner and dashboards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l4queue.config import Settings
from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import Plan, WorkerLoad
from l4queue.policy.loads import StageLoad, stage_load
from l4queue.protocol.calls import Call
from l4queue.protocol.keys import SOLO_STAGE, Keys
from l4queue.protocol.plans import is_of_a_newer_release, read_plan, readable_plans
from l4queue.protocol.reads import Reads, WorkerView

if TYPE_CHECKING:
    from l4queue.protocol.executor import AsyncExecutor, Executor

__all__ = (
    "Overview",
    "QueueView",
    "common_bytes_per_s",
    "cost_in_force",
    "longest_request_tokens",
    "price_in_force",
    "read_overview",
    "read_overview_async",
    "stage_loads",
)

_MAX_HISTORY = 32  # plans that are searched for one that this release can read


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """Content of a stage queue; `num_foreground` of it is not background, last seen at `foreground_ms`."""

    num_requests: int
    tokens: int
    num_foreground: int = 0
    foreground_ms: int | None = None

    def in_play(self, *, now_ms: int, quiet_ms: float) -> QueueView:
        """Without the background while it is held back; the tokens in proportion."""
        if self.foreground_ms is None or now_ms - self.foreground_ms >= quiet_ms or not self.num_requests:
            return self
        tokens = round(self.tokens * self.num_foreground / self.num_requests)
        return replace(self, num_requests=self.num_foreground, tokens=tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The deployment at one moment of the server's clock. Workers are those with a valid lease.

    Where this release cannot read the plan in force, `plan` is the latest published one that it can.
    """

    now_ms: int
    plan: Plan
    workers: tuple[WorkerLoad, ...]
    costs: tuple[dict[str, Any] | None, ...]
    prices: tuple[MovePrice, ...]
    queues: dict[str, QueueView]
    inbox: int
    counts: dict[str, int]
    share: float = 1.0  # of the workers there are, the part that `workers` has
    plan_version: int = 0  # of the plan in force, 0 where that is no number
    has_unreadable_plan: bool = False
    has_newer_plan: bool = False  # unreadable because only a newer release understands it

    def in_play(self, stage: str, *, quiet_ms: float) -> QueueView | None:
        """Requests of a queue that may be taken: background only after `quiet_ms` without others."""
        queue = self.queues.get(stage)
        return None if queue is None else queue.in_play(now_ms=self.now_ms, quiet_ms=quiet_ms)


def read_overview(executor: Executor, namespace: str) -> Overview:
    """Read it with a blocking executor, in two round trips."""
    keys = Keys(namespace)
    first = executor.run_many(_first(keys))
    second = executor.run_many(_second(keys, first))
    return _assemble(keys, first, second)


async def read_overview_async(executor: AsyncExecutor, namespace: str) -> Overview:
    """The same on an event loop."""
    keys = Keys(namespace)
    first = await executor.run_many(_first(keys))
    second = await executor.run_many(_second(keys, first))
    return _assemble(keys, first, second)


def stage_loads(
    overview: Overview, *, expected_output_tokens: float, cost: StepCost, quiet_ms: float
) -> list[StageLoad]:
    """The load of every stage of the plan, by what its workers published and what waits for it.

    Background counts only where no other request came for `quiet_ms`: until then it is held back.

    A worker counts for the stage that the plan gives it, even if its latest news is older than the plan. Where
    only some were drawn, each stands for as many as there are to one of them.
    """
    loads = []
    known = {i: index for index, stage in enumerate(overview.plan.stages) for i in stage.worker_ids}
    for index in range(len(overview.plan.stages)):
        queue = overview.in_play(str(index), quiet_ms=quiet_ms)
        loads.append(
            stage_load(
                index,
                [w for w in overview.workers if known.get(w.worker_id, w.stage) == index],
                queued_requests=queue.num_requests if queue else 0,
                queued_tokens=queue.tokens if queue else 0,
                expected_output_tokens=expected_output_tokens,
                cost=cost,
                share=overview.share,
                least_workers=len(overview.plan.stages[index].worker_ids) if overview.share < 1.0 else 0,
            )
        )
    return loads


def cost_in_force(overview: Overview, settings: Settings) -> StepCost:
    """The cost model in force: the median worker's own, once one has measured itself, else the file's."""
    known = sorted((StepCost(**cost) for cost in overview.costs if cost), key=lambda c: c.alpha_ms)
    if known:
        return known[len(known) // 2]
    return load_coefficients(settings.emulated_gpu, settings.emulated_model)


def longest_request_tokens(overview: Overview, settings: Settings) -> int:
    """Prompt and output of one request: the setting, else what every worker says that it holds, tokens."""
    told = [load.max_model_len for load in overview.workers if load.max_model_len]
    if "max_model_len" in settings.model_fields_set or not told:
        return settings.max_model_len
    return min(told)


def price_in_force(overview: Overview) -> MovePrice:
    """Price of moving a running request: a second prefill if any worker cannot move KV caches.

    Else at the median speed, with the least room of any.
    """
    slowest = min(overview.prices, key=lambda price: price.bandwidth_bytes_per_s or 0.0, default=MovePrice())
    if slowest.bandwidth_bytes_per_s is None:
        return slowest
    rooms = [price.room_bytes for price in overview.prices if price.room_bytes is not None]
    speed = common_bytes_per_s(overview.prices)
    return replace(slowest, bandwidth_bytes_per_s=speed, room_bytes=min(rooms, default=None))


def common_bytes_per_s(prices: Iterable[MovePrice]) -> float | None:
    """The median speed of the workers that move KV caches; None of none."""
    known = sorted(price.bandwidth_bytes_per_s for price in prices if price.bandwidth_bytes_per_s is not None)
    return known[len(known) // 2] if known else None


def _first(keys: Keys) -> list[Call[Any]]:
    reads = Reads(keys)
    return [
        reads.server_time_ms(),
        reads.plan(),
        reads.incarnations(),
        reads.backlog(),
        reads.counts(),
        reads.inbox_length(),
        reads.all_foreground_ms(),
    ]


def _second(keys: Keys, first: list[Any]) -> list[Call[Any]]:
    reads = Reads(keys)
    _, (_, body), incarnations, backlog, _, _, _ = first
    calls: list[Call[Any]] = [reads.worker(name, expires_ms) for name, expires_ms in incarnations]
    calls += [reads.queue_length(stage) for stage in backlog]
    calls += [reads.num_foreground(stage) for stage in backlog]
    is_readable = body is None or read_plan(body, key=keys.plan) is not None
    return calls if is_readable else [*calls, reads.plan_history(count=_MAX_HISTORY)]


def _assemble(keys: Keys, first: list[Any], second: list[Any]) -> Overview:
    now_ms, (version, body), incarnations, backlog, counts, inbox, came_ms = first
    num_workers = len(incarnations)
    views: list[WorkerView] = [view for view in second[:num_workers] if view is not None]
    num_queues = len(backlog)
    lengths, others = (second[num_workers + i * num_queues :][:num_queues] for i in range(2))
    plan = read_plan(body, key=keys.plan)
    is_unreadable = body is not None and plan is None
    if is_unreadable:
        history = readable_plans((text for _, _, text in second[-1]), key=keys.plans)
        plan = max(history, key=lambda known: known.version, default=None)
    queues = {
        stage: QueueView(
            num_requests=length,
            tokens=max(0, int(float(tokens))),
            num_foreground=other,
            foreground_ms=came_ms.get(stage),
        )
        for (stage, tokens), length, other in zip(backlog.items(), lengths, others, strict=True)
        if length or stage != SOLO_STAGE
    }
    alive = sorted((v for v in views if v.expires_ms > now_ms), key=lambda v: (v.worker_id, v.incarnation))
    return Overview(
        now_ms=now_ms,
        plan=plan or Plan.one_stage(),
        workers=tuple(view.load for view in alive),
        costs=tuple(view.cost.to_dict() if view.cost else None for view in alive),
        prices=tuple(view.price for view in alive if view.price),
        queues=queues,
        inbox=inbox,
        counts={name: int(float(value)) for name, value in counts.items()},
        plan_version=version,
        has_unreadable_plan=is_unreadable,
        has_newer_plan=is_unreadable and is_of_a_newer_release(body),
    )

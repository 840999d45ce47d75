"""State behind `stats --watch`: looks go in, values for now and for the last minute come out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.observe.overview import Overview
from l4queue.observe.watch import Look, RecentMove
from l4queue.protocol.keys import SOLO_STAGE, private_queue
from l4queue.protocol.ledger import MoveCounter
from l4queue.protocol.reads import FinishedRequest

__all__ = ("LATENCY_S", "Latency", "Picture", "Rates", "StageView", "Waiting", "WatchWindow")

LATENCY_S = 60.0
"""Period, s, of the latencies of ended requests and of the counts of moves."""
RATE_S = 10.0  # rates are means over this time
_MAX_FINISHED = 20_000  # requests kept for the percentiles
_MAX_MOVES = 50  # more than any screen shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Waiting requests of a queue; `oldest_ms` is None when there are none."""

    num_requests: int = 0
    tokens: int = 0
    oldest_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """One stage with its workers. Their own queues count as the stage's."""

    index: int
    stage: StagePlan
    workers: tuple[WorkerLoad, ...]
    waiting: Waiting

    @property
    def num_running(self) -> int:
        """Requests in the engines of this stage."""
        return sum(worker.num_running for worker in self.workers)

    @property
    def num_slots(self) -> int:
        """Most requests that these engines take."""
        return sum(worker.max_running for worker in self.workers)

    @property
    def kv_share(self) -> float:
        """Share of their KV caches in use, 0 to 1."""
        capacity = sum(worker.kv_capacity_tokens for worker in self.workers)
        return sum(worker.kv_used_tokens for worker in self.workers) / capacity if capacity else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Median and 99th percentile of what ended as `done`, ms. `stage`: of prompts in its range; None: of all."""

    stage: int | None
    num_requests: int
    ttft_ms: tuple[float, float] | None
    tpot_ms: tuple[float, float] | None
    e2e_ms: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of the last seconds, by the counters of Redis; None after the first look."""

    accepted_per_s: float | None
    done_per_s: float | None
    output_tokens_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All that is shown. Times are of the server's clock, ms."""

    at_ms: int
    plan: Plan
    stages: tuple[StageView, ...]
    inbox: Waiting
    solo: Waiting
    rates: Rates
    latencies: tuple[Latency, ...]
    counts: dict[str, int]
    moved: dict[str, int]
    moves: tuple[RecentMove, ...]

    @property
    def num_workers(self) -> int:
        """Workers that serve."""
        return sum(len(stage.workers) for stage in self.stages)


class WatchWindow:
    """Remembers the last minute of looks."""

    def __init__(self) -> None:
        self._finished: deque[FinishedRequest] = deque(maxlen=_MAX_FINISHED)
        self._counts: deque[tuple[int, dict[str, int]]] = deque()
        self._moves: dict[RecentMove, None] = {}

    def add(self, look: Look) -> Picture:
        """Take in one look and return what is to be shown now."""
        overview, now_ms = look.overview, look.overview.now_ms
        self._remember(look)
        return Picture(
            at_ms=now_ms,
            plan=overview.plan,
            stages=_stages(overview, look.ages_ms),
            inbox=Waiting(num_requests=overview.inbox, oldest_ms=look.ages_ms.get("in")),
            solo=_waiting(overview, look.ages_ms, [SOLO_STAGE]),
            rates=self._rates(),
            latencies=_latencies(self._finished, overview.plan),
            counts=overview.counts,
            moved={name.value: self._increase(name, LATENCY_S) for name in MoveCounter},
            moves=tuple(self._moves),
        )

    def _remember(self, look: Look) -> None:
        now_ms, counts = look.overview.now_ms, look.overview.counts
        before = self._counts[-1][1] if self._counts else {}
        if any(counts.get(name, 0) < before.get(name, 0) for name in ("done", *MoveCounter)):
            self._counts.clear()  # another Redis, or one that has lost its data
        self._counts.append((now_ms, counts))
        while self._counts[0][0] < now_ms - 1000 * LATENCY_S and len(self._counts) > 2:
            self._counts.popleft()
        self._finished.extend(reversed(look.finished))
        while self._finished and self._finished[0].finished_ms < now_ms - 1000 * LATENCY_S:
            self._finished.popleft()
        known = sorted({**self._moves, **dict.fromkeys(look.moves)}, key=lambda move: move.at_ms, reverse=True)
        self._moves = dict.fromkeys(known[:_MAX_MOVES])

    def _rates(self) -> Rates:
        return Rates(
            accepted_per_s=self._per_s("submitted"),
            done_per_s=self._per_s("done"),
            output_tokens_per_s=self._per_s("output_tokens"),
        )

    def _per_s(self, name: str) -> float | None:
        since_ms, _ = self._before(RATE_S)
        passed_s = (self._counts[-1][0] - since_ms) / 1000
        return self._increase(name, RATE_S) / passed_s if passed_s > 0 else None

    def _increase(self, name: str, seconds: float) -> int:
        return max(0, self._counts[-1][1].get(name, 0) - self._before(seconds)[1].get(name, 0))

    def _before(self, seconds: float) -> tuple[int, dict[str, int]]:
        """The latest counts that are at least so old, or the oldest there are."""
        now_ms = self._counts[-1][0]
        return next((c for c in reversed(self._counts) if c[0] <= now_ms - 1000 * seconds), self._counts[0])


def _stages(overview: Overview, ages_ms: dict[str, int]) -> tuple[StageView, ...]:
    """Workers by the plan, even where their latest news is older than it."""
    known = {name: index for index, stage in enumerate(overview.plan.stages) for name in stage.worker_ids}
    last = len(overview.plan.stages) - 1
    views = []
    for index, stage in enumerate(overview.plan.stages):
        workers = tuple(w for w in overview.workers if min(known.get(w.worker_id, w.stage), last) == index)
        queues = [str(index), *(private_queue(worker.worker_id) for worker in workers)]
        waiting = _waiting(overview, ages_ms, queues)
        views.append(StageView(index=index, stage=stage, workers=workers, waiting=waiting))
    return tuple(views)


def _waiting(overview: Overview, ages_ms: dict[str, int], names: Iterable[str]) -> Waiting:
    found = [(overview.queues[name], ages_ms.get(name)) for name in names if name in overview.queues]
    return Waiting(
        num_requests=sum(queue.num_requests for queue, _ in found),
        tokens=sum(queue.tokens for queue, _ in found),
        oldest_ms=max((age_ms for _, age_ms in found if age_ms is not None), default=None),
    )


def _latencies(finished: Iterable[FinishedRequest], plan: Plan) -> tuple[Latency, ...]:
    """By the stage in whose range the prompt lies, then all together if there is more than one stage."""
    done = [row for row in finished if row.state == "done"]
    by_stage: list[list[FinishedRequest]] = [[] for _ in plan.stages]
    for row in done:
        by_stage[plan.stage_of(row.prompt_tokens)].append(row)
    found = [_latency(index, rows) for index, rows in enumerate(by_stage)]
    return tuple(found) if len(found) == 1 else (*found, _latency(None, done))


def _latency(stage: int | None, rows: Sequence[FinishedRequest]) -> Latency:
    started = [row for row in rows if row.first_token_ms is not None]
    return Latency(
        stage=stage,
        num_requests=len(rows),
        ttft_ms=_quantiles([(row.first_token_ms or 0) - row.submitted_ms for row in started]),
        tpot_ms=_quantiles(
            [
                (row.finished_ms - (row.first_token_ms or 0)) / (row.output_tokens - 1)
                for row in started
                if row.output_tokens > 1
            ]
        ),
        e2e_ms=_quantiles([row.finished_ms - row.submitted_ms for row in rows]),
    )


def _quantiles(values: Sequence[float]) -> tuple[float, float] | None:
    """Median and 99th percentile by nearest rank; None without values."""
    if not values:
        return None
    ranked = sorted(values)
    return tuple(float(ranked[math.ceil(q * len(ranked)) - 1]) for q in (0.5, 0.99))  # type: ignore[return-value]

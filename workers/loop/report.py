"""Report of a worker: its load for the fleet, its snapshot for metrics, its stats for dashboards."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import JsonValue

from l4queue.model_config import served_names
from l4queue.models import WorkerLoad
from l4queue.policy.loads import backlog_ms
from workers.loop.context import WorkerContext
from workers.loop.engine_profile import EngineProfile
from workers.loop.placement import Placement
from workers.loop.sessions import Sessions
from workers.telemetry.snapshot import WorkerSnapshot

__all__ = ("WorkerReport",)


class WorkerReport:
    """Reads the other parts of the worker and writes nothing. Safe on any thread."""

    def __init__(
        self,
        context: WorkerContext,
        *,
        sessions: Sessions,
        placement: Placement,
        profile: EngineProfile,
        incarnation: Callable[[], str],
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._placement = placement
        self._profile = profile
        self._incarnation = incarnation
        self._models = served_names(context.settings)

    def load(self) -> WorkerLoad:
        """The load of this worker now, as it publishes it."""
        stats = self._context.engine.stats()
        info = self._profile.info if self._profile.is_started else None
        return WorkerLoad(
            worker_id=self._context.worker_id,
            incarnation=self._incarnation(),
            stage=self._placement.stage,
            num_running=len(self._sessions),
            num_waiting_in_engine=stats.num_waiting,
            context_tokens=sum(session.length_tokens for session in self._sessions),
            pending_prefill_tokens=self._sessions.pending_prefill_tokens,
            longest_prefill_tokens=max(self._sessions.prefills, default=0),
            prefill_due_ms=round(self._prefill_due_ms(), 3),
            kv_used_tokens=stats.kv_used_tokens,
            kv_capacity_tokens=info.kv_capacity_tokens if info else 0,
            max_running=self._profile.max_running,
            step_ms=round(stats.last_step_ms, 3),
            is_draining=self._placement.is_draining,
            engine=info.name if info else "",
            num_finished=self._sessions.num_finished,
            num_preemptions=stats.num_preemptions,
            is_emptying=self._placement.is_emptying,
            can_empty=True,
            max_model_len=info.max_model_len if info else 0,
            num_prompt_tokens=self._sessions.num_prompt_tokens,
            num_cached_tokens=self._sessions.num_cached_tokens,
            models=self._models,
            copies_due_ms=round(self._copies_due_ms(), 3),
            kv_budget_bytes=stats.kv_budget_bytes,
        )

    def _prefill_due_ms(self) -> float:
        """Prefill of the prompts without a token, each by itself and without what the cache holds."""
        cost = self._profile.cost
        return sum(cost.prefill_ms(s.length_tokens, s.found_tokens) for s in self._sessions.unfilled)

    def _copies_due_ms(self) -> float:
        """KV caches of requests that leave, and of those that have come and have no token here yet."""
        if not self._profile.is_started or not self._profile.copies_wait:
            return 0.0
        price = self._profile.move_price
        moving = (s for s in self._sessions if s.is_moving or (s.awaits_first_token and s.grant.kv))
        return sum(price.copy_ms(session.length_tokens) for session in moving)

    def work_before_ms(self) -> float:
        """Work before the engine now, ms: of workers that wait the one with the least takes an arrival."""
        return backlog_ms(
            len(self._sessions),
            sum(session.length_tokens for session in self._sessions),
            pending_prefill_tokens=self._sessions.pending_prefill_tokens,
            cost=self._profile.cost,
        )

    def snapshots(self) -> list[WorkerSnapshot]:
        """The worker for its metrics; none before the engine has started."""
        if not self._profile.is_started:
            return []
        return [
            WorkerSnapshot(
                load=self.load(),
                engine=self._context.engine.stats(),
                steps=self._profile.steps,
                plan_version=self._placement.plan.version,
                num_stolen=self._sessions.num_stolen,
                num_handed_over=self._sessions.num_handed_over,
                is_calibrated=self._profile.is_calibrated,
            )
        ]

    def stats(self) -> dict[str, JsonValue]:
        """The worker for dashboards."""
        worker_id = self._context.worker_id
        if not self._profile.is_started:
            return {"worker": worker_id, "engine": "loading", "model": self._context.settings.model}
        load, engine, info = self.load(), self._context.engine.stats(), self._profile.info
        return {
            "worker": worker_id,
            "engine": f"{load.engine} {info.version}",
            "model": info.model,
            "stage": load.stage,
            "range_tokens": self._placement.range_text(load.stage),
            "plan_version": self._placement.plan.version,
            "running": load.num_running,
            "max_running": load.max_running,
            "context_tokens": load.context_tokens,
            "kv_share": round(load.kv_share, 4),
            "step_ms": load.step_ms,
            "finished": load.num_finished,
            "stolen": self._sessions.num_stolen,
            "handed_over": self._sessions.num_handed_over,
            "kv_loads": engine.num_kv_loads,
            "kv_misses": engine.num_kv_misses,
            "draining": load.is_draining,
        }

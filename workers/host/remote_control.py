"""Remote control of a GPU worker: answers of Flower and `celery inspect|control` about its requests."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from celery.worker import state as celery_state
from celery.worker.control import Panel

from workers.host.bootsteps import EngineThread
from workers.telemetry.observer import RequestView

__all__ = ("install_panel",)

_ONE_ENGINE = "a worker has one engine; start or stop workers instead"
_OWN_QUEUE = "a worker listens to its own control queue only"


def install_panel(engine: EngineThread, *, hostname: str, task_name: str) -> None:
    """Replace Celery's handlers, process-wide, that would otherwise speak of Celery tasks."""
    panel = _Panel(engine, hostname=hostname, task_name=task_name)
    inspect = {"type": "inspect"}
    Panel.register(panel.active, name="active", alias="dump_active", **inspect)
    Panel.register(panel.query_task, name="query_task", variadic="ids", signature="[id1 [id2 ...]]", **inspect)
    Panel.register(panel.revoke, name="revoke", variadic="task_id", signature="[id1 [id2 ...]]")
    Panel.register(
        panel.terminate,
        name="terminate",
        variadic="task_id",
        args=[("signal", str)],
        signature="<signal> [id1 [id2 ...]]",
    )
    for name in ("pool_grow", "pool_shrink", "pool_restart", "autoscale"):
        Panel.register(_refuse(_ONE_ENGINE), name=name, help=_ONE_ENGINE)
    for name in ("add_consumer", "cancel_consumer"):
        Panel.register(_refuse(_OWN_QUEUE), name=name, help=_OWN_QUEUE)


class _Panel:
    """Handlers run on Celery's main thread; what they ask of the engine is thread-safe."""

    def __init__(self, engine: EngineThread, *, hostname: str, task_name: str) -> None:
        self._engine = engine
        self._hostname = hostname
        self._task_name = task_name

    def active(self, state: Any, **_: Any) -> list[dict[str, Any]]:
        """List of requests running in the engine."""
        return [self._info(view) for view in self._engine.active()]

    def query_task(self, state: Any, ids: Any = (), **_: Any) -> dict[str, Any]:
        """Query for requests running here by id."""
        wanted = _ids(ids)
        return {v.request_id: ("active", self._info(v)) for v in self._engine.active() if v.request_id in wanted}

    def revoke(self, state: Any, task_id: Any = (), **_: Any) -> dict[str, str]:
        """Cancel requests by id, waiting or running; `terminate` makes no difference."""
        found = _ids(task_id)
        celery_state.revoked.update(found)
        for request_id in found:
            self._engine.request_cancel(request_id)
        return {"ok": f"cancelling {', '.join(sorted(found))}"}

    def terminate(self, state: Any, signal: Any = None, task_id: Any = (), **_: Any) -> dict[str, str]:
        """Cancel requests by id, waiting or running; the signal makes no difference."""
        return self.revoke(state, task_id)

    def _info(self, view: RequestView) -> dict[str, Any]:
        return {
            "id": view.request_id,
            "name": self._task_name,
            "type": self._task_name,
            "args": [],
            "kwargs": {
                "stage": view.stage,
                "range": view.range_text,
                "prompt_tokens": view.prompt_tokens,
                "max_tokens": view.max_tokens,
                "resumed_tokens": view.num_resumed,
            },
            "hostname": self._hostname,
            "acknowledged": True,
            "redelivered": view.epoch > 1,
            "delivery_info": {"exchange": "", "routing_key": f"stage-{view.stage}", "redelivered": view.epoch > 1},
            "worker_pid": os.getpid(),
        }


def _ids(given: str | Iterable[str] | None) -> set[str]:
    if given is None:
        return set()
    return {given} if isinstance(given, str) else set(given)


def _refuse(why: str) -> Any:
    def refuse(state: Any, **_: Any) -> dict[str, str]:
        return {"error": why}

    return refuse

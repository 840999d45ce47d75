"""The planner's Celery app, for `celery -A dispatcher.app beat|worker|flower`: two tasks on a schedule."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from celery.signals import worker_init
from kombu import Connection

from dispatcher.tasks import REFINE, REPLAN, add_tasks
from l4queue.config import Settings, celery_settings, load_settings
from l4queue.redis_url import without_secrets

__all__ = ("make_app",)

_NICENESS = 19


class _Connection(Connection):  # type: ignore[misc]  # kombu has no types
    """A connection that tells no secrets: what it tells goes to Flower and `celery inspect stats`."""

    def info(self) -> dict[str, Any]:
        """Facts about it."""
        return without_secrets(super().info())


class _Amqp(AMQP):  # type: ignore[misc]  # Celery has no types
    """Celery's, with these connections."""

    Connection = _Connection


def make_app(settings: Settings) -> Celery:
    """The app with the `replan` task every `replan_interval_s` and `refine` every `refine_interval_s`.

    A round that could not start before the next one is due is dropped, so a backlog never builds up. Any
    number of beats and planners may run: a plan is published by compare-and-set.
    """
    app = Celery("l4queue", amqp=_Amqp)
    app.conf.update(celery_settings(settings))
    app.conf.update(
        beat_schedule={
            "replan": {
                "task": REPLAN,
                "schedule": settings.replan_interval_s,
                "options": {"expires": 0.8 * settings.replan_interval_s},
            },
            "refine": {
                "task": REFINE,
                "schedule": settings.refine_interval_s,
                "options": {"expires": 0.8 * settings.refine_interval_s},
            },
        },
        # Two entries that may start anew at any time: nothing is worth a schedule file.
        beat_scheduler="celery.beat:Scheduler",
        broker_connection_max_retries=None,
        worker_concurrency=1,
        worker_pool="solo",
        # Never used, but without one every revoked request is a warning in the planner's log.
        result_backend="cache+memory://",
    )
    add_tasks(app, settings)
    return app


@worker_init.connect  # type: ignore[untyped-decorator] # Celery has no types
def _stand_back(**_: Any) -> None:
    """A replay takes seconds of a core: where it shares a machine with engines, those go first, on CPUs too."""
    os.nice(_NICENESS)


@cache
def _app_from_environment() -> Celery:
    return make_app(load_settings())


def __getattr__(name: str) -> Celery:
    """`dispatcher.app.app`, made on first use from the environment: what `celery -A dispatcher.app` looks for."""
    if name == "app":
        return _app_from_environment()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

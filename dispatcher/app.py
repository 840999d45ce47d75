"""The planner's Celery app, for `celery -A dispatcher.app beat|worker|flower`: two tasks on a schedule."""

from __future__ import annotations

import logging
import os
import time
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from celery.schedules import schedule
from celery.signals import setup_logging, worker_init, worker_ready
from kombu import Connection

from dispatcher.planner.tasks import REFINE, REPLAN, add_tasks
from l4queue.celery_config import celery_settings
from l4queue.config import Settings, load_settings
from l4queue.logs import start_logging
from l4queue.redis_url import without_secrets

__all__ = ("make_app", "steady_now")

log = logging.getLogger("l4queue.planner")
_NICENESS = 19
"""The lowest priority of POSIX systems."""
_BEGUN_AT, _BEGUN_S = datetime.now(UTC), time.monotonic()


def steady_now() -> datetime:
    """The time by which beat counts periods: its clock may be set back, and rounds would wait for as long."""
    return _BEGUN_AT + timedelta(seconds=time.monotonic() - _BEGUN_S)


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

    Rounds that have waited are left out by the tasks, so a backlog never builds up: an expiry in the message would
    compare the clock of beat's host with the planner's. Any number of beats and planners may run: a plan is
    published by compare-and-set.
    """
    app = Celery("l4queue", amqp=_Amqp)
    app.conf.update(celery_settings(settings))
    app.conf.update(
        beat_schedule={
            "replan": {
                "task": REPLAN,
                "schedule": schedule(settings.replan_interval_s, nowfun=steady_now),
            },
            "refine": {
                "task": REFINE,
                "schedule": schedule(settings.refine_interval_s, nowfun=steady_now),
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


@worker_ready.connect  # type: ignore[untyped-decorator] # Celery has no types
def _say_ready(sender: Any, **_: Any) -> None:
    log.info("planner ready: %s", sender.hostname)


@setup_logging.connect  # type: ignore[untyped-decorator] # Celery has no types
def _log_as_the_others(loglevel: int | str | None = None, **_: Any) -> None:
    """Celery's own formats would leave out the fields of a line. Plans are told at any level of Celery's."""
    start_logging(load_settings().log_format, level=loglevel or "WARNING")
    log.setLevel(logging.INFO)


@cache
def _app_from_environment() -> Celery:
    return make_app(load_settings())


def __getattr__(name: str) -> Celery:
    """`dispatcher.app.app`, made on first use from the environment: what `celery -A dispatcher.app` looks for."""
    if name == "app":
        return _app_from_environment()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

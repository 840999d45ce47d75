"""The Celery app of GPU workers, for `celery -A workers.app inspect|control|flower`; it has no tasks."""

from __future__ import annotations

import socket
from functools import cache
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from kombu import Connection

from l4queue.celery_config import celery_settings
from l4queue.config import Settings, load_settings
from l4queue.redis_url import without_secrets

__all__ = ("QUEUE", "make_app", "node_name")

QUEUE = "l4-workers"
"""What GPU workers consume, because Celery wants a queue. Nothing is put there; the planner's is another."""


class _Connection(Connection):  # type: ignore[misc]  # kombu has no types
    """A connection that tells no secrets: what it tells goes to Flower and `celery inspect stats`."""

    def info(self) -> dict[str, Any]:
        """Facts about it."""
        return without_secrets(super().info())


class _Amqp(AMQP):  # type: ignore[misc]  # Celery has no types
    """Celery's, with these connections."""

    Connection = _Connection


def make_app(settings: Settings) -> Celery:
    """The app: control and events only. Requests never travel through Celery."""
    app = Celery("l4queue-workers", amqp=_Amqp)
    app.conf.update(celery_settings(settings))
    # An engine serves on while the broker is away, however long that takes.
    app.conf.broker_connection_max_retries = None
    app.conf.worker_cancel_long_running_tasks_on_connection_loss = False
    return app


def node_name(worker_id: str) -> str:
    """The Celery node of a worker: `<worker_id>@<host>`, or the id itself where it names its host."""
    return worker_id if "@" in worker_id else f"{worker_id}@{socket.gethostname()}"


@cache
def _app_from_environment() -> Celery:
    return make_app(load_settings())


def __getattr__(name: str) -> Celery:
    """`workers.app.app`, made on first use from the environment: what `celery -A workers.app` looks for."""
    if name == "app":
        return _app_from_environment()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

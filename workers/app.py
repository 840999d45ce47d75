"""The Celery app of GPU workers: control and events only. Flower uses it: `celery -A workers.app flower`."""

from __future__ import annotations

from typing import Any

from celery import Celery

from l4queue.config import Settings, celery_settings, load_settings

__all__ = ("TASK_NAME", "app", "make_app")

TASK_NAME = "l4queue.generate"
"""The name under which Flower shows every request."""


def make_app(settings: Settings) -> Any:
    """A Celery app on the control broker of these settings."""
    made = Celery("l4queue.workers")
    made.conf.update(celery_settings(settings))
    return made


app = make_app(load_settings())

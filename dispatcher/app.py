"""The Celery app of the planner: `celery -A dispatcher.app beat` and `celery -A dispatcher.app worker`."""

from __future__ import annotations

from celery import Celery

from l4queue.config import celery_settings, load_settings

__all__ = ("app",)

_settings = load_settings()

app = Celery("l4queue.dispatcher", include=["dispatcher.tasks"])
app.conf.update(celery_settings(_settings))
app.conf.beat_schedule = {
    "replan": {
        "task": "l4queue.replan",
        "schedule": _settings.replan_interval_s,
        # a backlog of stale rounds would only repeat the same decision
        "options": {"expires": max(1.0, 0.9 * _settings.replan_interval_s)},
    }
}
app.conf.beat_max_loop_interval = 5

"""Configuration of every Celery app of l4queue."""

from __future__ import annotations

from typing import Any

from l4queue.config import Settings

__all__ = ("celery_settings",)


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Celery configuration of every l4queue app: JSON only, no results, events on, short visibility."""
    tls = {"broker_use_ssl": settings.broker_tls} if settings.broker_tls else {}
    return {
        "broker_url": settings.broker_url.reveal(),
        **tls,
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_ignore_result": True,
        "task_default_queue": "l4-control",
        "worker_prefetch_multiplier": 1,
        "task_acks_late": True,
        "worker_send_task_events": True,
        "broker_connection_retry_on_startup": True,
        # A broker that refuses (disk full, no memory, no right) is waited for as one that is away.
        "broker_channel_error_retry": True,
        "broker_transport_options": {
            "visibility_timeout": 60,
            "global_keyprefix": f"{settings.namespace}-celery:",
        },
        "worker_hijack_root_logger": False,
        "enable_utc": True,
    }

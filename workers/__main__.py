"""Entry point of one GPU worker: `python -m workers`. SIGTERM and SIGINT drain it, SIGQUIT does not."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery, signals
from celery.platforms import SecurityWarning
from celery.worker import state as celery_state
from pydantic import JsonValue

from l4queue.config import Settings, load_settings
from l4queue.errors import ConfigError, L4QueueError
from l4queue.failure import EXIT_FAILED, fail
from l4queue.logs import start_logging, take_log_format
from l4queue.metrics import MetricsServer
from l4queue.observe.task_view import task_name
from workers.app import QUEUE, make_app, node_name
from workers.build import make_worker
from workers.host.bootsteps import EngineHost, EngineThread, ExitGuard, RequestHeart, WorkerLike
from workers.host.remote_control import install_panel
from workers.host.task_events import EventSender
from workers.process.devices import take_devices
from workers.process.guard import guard_descendants
from workers.telemetry.metrics import WorkerMetrics
from workers.telemetry.observer import Observer
from workers.telemetry.tracing import open_traces

__all__ = ("launch", "main", "serve")

log = logging.getLogger("l4queue.worker")
_MARGIN_S = 10.0  # for the engine to end after the drain
_EXIT_S = 5.0  # for the interpreter to end, once everything is stopped


def serve(
    settings: Settings,
    *,
    make: Callable[[Settings, Observer], WorkerLike] = make_worker,
    margin_s: float = _MARGIN_S,
) -> int:
    """Run this process as a GPU worker until it is told to stop; returns the exit code. Main thread only.

    It does not return when the engine has not ended in time: the process ends with code 1, children included.
    `margin_s` is what the engine may take to end, after requests were given back within `drain_s`.
    """
    node, name = node_name(settings.worker_name), task_name(settings)
    app, guard = make_app(settings), ExitGuard()
    sender = EventSender(
        app,
        hostname=node,
        task_name=name,
        show_outputs=settings.flower_show_prompts,
        sample_above_per_s=settings.flower_sample_above_per_s,
    )
    traces = open_traces(settings, sender)
    engine = EngineThread(lambda: make(settings, traces or sender), guard=guard)
    drain_s = settings.drain_s + margin_s

    def stats() -> dict[str, JsonValue]:
        own = engine.stats()
        return {**own, **sender.stats(), "total": {name: own.get("finished", 0)}}

    signals_seen: list[str] = []

    def shutting_down(how: str = "Warm", **_: Any) -> None:
        signals_seen.append(how)
        guard.arm(_EXIT_S if how == "Cold" else drain_s + _EXIT_S)
        engine.request_stop()

    signals.worker_shutting_down.connect(shutting_down, weak=False)
    signals.setup_logging.connect(_keep_logging, weak=False)
    install_panel(engine, hostname=node, task_name=name)
    controller = _controller(app, hostname=node, engine=engine, drain_s=drain_s, stats=stats)
    with MetricsServer(settings, WorkerMetrics(engine.snapshots, sender.stats)):
        sender.start()
        if traces is not None:
            traces.start()
        try:
            controller.start()
        finally:
            guard.arm(drain_s + _EXIT_S)
            engine.request_stop()
            is_drained = celery_state.should_terminate is None and engine.join(drain_s)
            if traces is not None:
                traces.close()
            sender.close()
            guard.arm(_EXIT_S)
    if not is_drained:
        guard.end_now()
    if isinstance(engine.failure, ConfigError):
        return fail(engine.failure)
    log.info("worker %s ended", node)
    # Celery calls an end by SIGINT a failure; a drained worker that was asked to end has not failed.
    is_well = engine.failure is None and (signals_seen or not controller.exitcode)
    return 0 if is_well else EXIT_FAILED


def _controller(app: Celery, **steps_given: Any) -> Any:
    """Celery's worker, told what our steps need. No pool, no gossip: it only listens and beats."""
    app.steps["worker"].add(EngineHost)
    app.steps["consumer"].add(RequestHeart)
    return app.Worker(
        pool="solo",
        concurrency=1,
        queues=[QUEUE],
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=True,
        quiet=True,
        **steps_given,
    )


def launch(start: Callable[[], int]) -> int:
    """Set this process up for `serve`, which `start` calls, and return its exit code; our errors in one line."""
    warnings.simplefilter("ignore", SecurityWarning)  # of root, because of pickle: which is off here
    guard_descendants()
    try:
        start_logging(load_settings().log_format)
        return start()
    except L4QueueError as error:
        return fail(error)


def main(arguments: Sequence[str] = ()) -> int:
    """Entry point; the exit code is not zero when the engine failed or the drain did not end in time.

    `--log-format` wins over L4_LOG_FORMAT.
    """
    take_log_format(arguments)
    return launch(lambda: serve(take_devices(load_settings())))


def _keep_logging(**_: Any) -> None:
    """Connected, it keeps Celery from configuring logging a second time."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

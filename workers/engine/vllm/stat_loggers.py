"""Loggers of vLLM's statistics: ours, which reports each step, and none for Prometheus where it is not wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ("drop_metrics", "step_logger")


def step_logger(on_step: Callable[[Any, Any], None]) -> Callable[[Any, int], Any]:
    """Factory of a logger that calls `on_step` with the statistics of each step."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Logger(StatLoggerBase):  # type: ignore[misc] # vLLM is imported late and untyped
        """Says that a step is over, with its statistics; prints nothing."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self.engine_index = engine_index

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            on_step(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return Logger


def drop_metrics(manager: Any) -> None:
    """Leave out the logger for Prometheus, which vLLM adds whatever it is asked for."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    manager.stat_loggers = [one for one in manager.stat_loggers if not isinstance(one, PrometheusStatLogger)]

"""Devices of this machine for the workers of a deployment, and whether it can have a gateway."""

from __future__ import annotations

from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.hardware import Gpu, engine_build, missing_library, view_gpus

__all__ = ("may_have_gateway", "usable_gpus")


def usable_gpus(settings: Settings, *, workers: int | None, workers_per_process: int) -> list[Gpu]:
    """GPUs for vLLM in workers; none where it runs on CPUs, or elsewhere. ConfigError where parts are missing."""
    if settings.engine != "emulated" and workers_per_process > 1:
        raise ConfigError("several workers in one process are for --engine emulated only")
    if settings.engine != "vllm":
        return []
    build = engine_build()
    if build is None:
        raise ConfigError(
            "vLLM is not installed; `make install`, or `pip install 'l4queue[gpu]'`, or use --engine emulated"
        )
    missing = missing_library(build)
    if missing is not None:
        raise ConfigError(missing)
    view = view_gpus()
    gpus = view.for_groups_of(settings.tensor_parallel) if build.kind == "gpu" else []
    needed = (workers or 1) * settings.tensor_parallel
    if build.kind == "gpu" and len(gpus) < needed:
        why = f" ({view.why})" if view.notes else ""
        raise ConfigError(
            f"{workers or 1} workers need {needed} GPUs, and {len(gpus)} can be used here{why}; "
            "see `l4queue doctor`, or install the CPU build of vLLM"
        )
    return gpus


def may_have_gateway(settings: Settings) -> bool:
    """Whether a gateway can run here: it reads what vLLM knows of the model, and takes its server."""
    return settings.engine == "vllm" or (settings.engine == "http" and engine_build() is not None)

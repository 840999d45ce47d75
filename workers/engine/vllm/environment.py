"""Environment of vLLM: defaults for its CPU build; the user's own values win."""

from __future__ import annotations

import os
from pathlib import Path

from l4queue.hardware import engine_build
from l4queue.logs import logs_json

__all__ = ("bind_threads", "prepare_environment")


def prepare_environment(*, kv_cache_gib: int, cores: str, model: str) -> None:
    """Defaults for vLLM's CPU build and for an engine inside somebody else's process; the user's own win."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib))
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    build = engine_build()
    if build is not None and build.kind == "cpu":
        # Else the first request with logprobs waits for g++, and its neighbours with it: 17 s on two cores.
        # Without a compiler it ends the engine. The model itself runs eagerly.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if logs_json():  # the engine core's process too, which has a logging of its own
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(Path(__file__).with_name("logging.json")))
    if cores:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    if os.path.isdir(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def bind_threads() -> bool:
    """Let the engine core compute with the model's threads on its cores; False where these are not stated.

    By default vLLM's CPU build gives the model a process of its own. The engine core then spins while it waits for
    each step and, where every core belongs to an engine, takes a quarter of a core from the neighbour. The build
    allows one process only under VLLM_ENABLE_V1_MULTIPROCESSING=0 (AsyncLLM's core is a process all the same) and
    sets its OpenMP variables only for the other way, so they are set here: after torch was imported, for the
    threads of this process are not to be bound.
    """
    cores = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")
    numbers = [int(part) for part in cores.split(",") if part.isdigit()]
    if not numbers or cores != ",".join(map(str, numbers)):
        return False
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(len(numbers)))
    os.environ.setdefault("GOMP_CPU_AFFINITY", " ".join(map(str, numbers)))
    return os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"

"""A worker as the settings ask for it: engine, text, cost model."""

from __future__ import annotations

from l4queue.config import Settings
from l4queue.policy.coefficients import load_coefficients
from l4queue.policy.cost import StepCost
from l4queue.tiny import cache_directory
from workers.emulated import EmulatedEngine
from workers.engine import Engine
from workers.observer import Observer
from workers.session import TextFactory
from workers.text import no_text, text_factory
from workers.tiny import build_tiny_model
from workers.vllm_engine import VllmEngine
from workers.worker import Worker

__all__ = ("make_worker", "model_path")


def model_path(settings: Settings) -> str:
    """Where the model is; `tiny` is built in the user's cache when it is not there yet."""
    if settings.model != "tiny":
        return settings.model
    return str(build_tiny_model(cache_directory()))


def make_worker(settings: Settings, observer: Observer) -> Worker:
    """The worker of this process; ConfigError says what is missing."""
    cost = load_coefficients(settings.emulated_gpu, settings.emulated_model)
    engine, text = _engine(settings, cost)
    return Worker(
        settings=settings,
        engine=engine,
        observer=observer,
        worker_id=settings.worker_name,
        text=text,
        cost=cost,
    )


def _engine(settings: Settings, cost: StepCost) -> tuple[Engine, TextFactory]:
    if settings.engine == "emulated":
        emulated = EmulatedEngine(
            cost,
            speed=settings.emulated_speed,
            max_model_len=settings.max_model_len,
            name=f"{settings.emulated_model} on {settings.emulated_gpu}",
        )
        return emulated, text_factory(settings.tokenizer) if settings.tokenizer else no_text
    path = model_path(settings)
    engine = VllmEngine(
        path,
        max_model_len=settings.max_model_len,
        max_running=settings.max_running,
        dtype=settings.dtype,
        tensor_parallel=settings.tensor_parallel,
        gpu_memory_share=settings.gpu_memory_share,
        cpu_cores=settings.cpu_cores,
        cpu_kv_cache_gib=settings.cpu_kv_cache_gib,
    )
    return engine, text_factory(settings.tokenizer or path)

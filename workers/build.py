"""Construction of a worker from the settings: engine, text, cost model."""

from __future__ import annotations

import logging
from pathlib import Path

from l4queue.config import Settings
from l4queue.cost.coefficients import CoefficientFile, read_coefficients
from l4queue.engine_server import engine_headers, engine_urls, model_names, read_engine_server
from l4queue.errors import ConfigError
from l4queue.model_cache import cache_directory
from l4queue.model_config import trusts_remote_code, with_model_facts
from l4queue.pretrained import end_token_ids
from l4queue.smollm2 import SMOLLM2, convert_smollm2
from l4queue.tiny import TINY
from workers.engine.base import Engine
from workers.engine.emulated.engine import EmulatedEngine
from workers.engine.loop_work import LoopWork
from workers.engine.vllm.engine import VllmEngine
from workers.kv.store import SegmentStore, default_directory
from workers.loop.session import TextFactory
from workers.loop.text import no_text, text_factory
from workers.loop.worker import Worker
from workers.telemetry.observer import Observer
from workers.tiny import build_tiny_model

__all__ = ("kv_directory", "make_worker", "model_path")

log = logging.getLogger("l4queue.worker")
_USUAL_BATCHED_TOKENS = 2048  # of vLLM's server where --max-num-batched-tokens is not set
_CONSTRAINT_PATIENCE = 4.0  # a worker's machine is busier than that of the dispatcher that checked the same before


def model_path(settings: Settings) -> str:
    """Where the model is; `tiny` and `smollm2` are made in the user's cache when they are not there yet."""
    if settings.model == TINY:
        return str(build_tiny_model(cache_directory()))
    if settings.model == SMOLLM2:
        return str(convert_smollm2(cache_directory()))
    return settings.model


def make_worker(settings: Settings, observer: Observer) -> Worker:
    """The worker of this process; ConfigError says what is missing."""
    settings = with_model_facts(settings)
    coefficients = read_coefficients(settings.emulated_gpu, settings.emulated_model)
    work = LoopWork()
    engine, text = _engine(settings, coefficients, work)
    return Worker(
        settings=settings,
        engine=engine,
        observer=observer,
        worker_id=settings.worker_name,
        text=text,
        cost=coefficients.cost,
        work=work,
    )


def kv_directory(settings: Settings) -> Path | None:
    """Where engines of this host exchange KV; None: nowhere, requests that move are prefilled again.

    A directory that cannot be used is said once and costs nothing but that.
    """
    if settings.kv_handover_bytes == 0:
        return None
    directory = default_directory(settings.namespace)
    try:
        SegmentStore(directory, limit_bytes=settings.kv_handover_bytes)
    except ConfigError as error:
        log.warning("requests that move are prefilled again: %s", error)
        return None
    return directory


def _engine(settings: Settings, coefficients: CoefficientFile, work: LoopWork) -> tuple[Engine, TextFactory]:
    trusts = trusts_remote_code(settings)
    if settings.engine == "emulated":
        emulated = EmulatedEngine(
            coefficients.cost,
            speed=settings.emulated_speed,
            max_model_len=settings.max_model_len,
            name=f"{settings.emulated_model} on {settings.emulated_gpu}",
            kv_bytes_per_s=settings.emulated_kv_bytes_per_s,
            has_prefix_cache=settings.emulated_prefix_cache,
            kv_bytes_per_token=coefficients.kv_bytes_per_token,
        )
        if not settings.tokenizer:
            return emulated, no_text
        return emulated, text_factory(settings.tokenizer, trust_remote_code=trusts)
    path = model_path(settings)
    if settings.engine == "http":
        text = text_factory(settings.tokenizer or path, trust_remote_code=trusts)
        return _http_engine(settings, path, trusts=trusts), text
    engine = VllmEngine(
        path,
        max_model_len=settings.max_model_len if "max_model_len" in settings.model_fields_set else None,
        max_running=settings.max_running,
        dtype=settings.dtype,
        max_batched_tokens=settings.max_batched_tokens or None,
        tensor_parallel=settings.tensor_parallel,
        gpu_memory_share=settings.gpu_memory_share,
        vllm_args=settings.vllm_args,
        cpu_cores=settings.cpu_cores,
        cpu_kv_cache_gib=settings.cpu_kv_cache_gib,
        kv_directory=kv_directory(settings),
        kv_handover_bytes=settings.kv_handover_bytes,
        keep_metrics=bool(settings.metrics_port),
        work=work,
        constraint_limit_s=_CONSTRAINT_PATIENCE * settings.constraint_check_s,
    )
    return engine, text_factory(settings.tokenizer or path, trust_remote_code=trusts)


def _http_engine(settings: Settings, path: str, *, trusts: bool) -> Engine:
    """The engine of the one server that the settings name; ConfigError where there is not one."""
    try:
        from workers.engine.http.engine import HttpEngine
    except ImportError as error:
        raise ConfigError("aiohttp is missing, which L4_ENGINE=http needs: install l4queue[http]") from error
    urls = engine_urls(settings)
    if len(urls) > 1:
        raise ConfigError(f"L4_ENGINE_URL names {len(urls)} servers, and a worker drives one: start one for each")
    return HttpEngine(
        urls[0],
        describe=lambda: read_engine_server(urls[0], settings),
        model_names=model_names(settings, path),
        headers=engine_headers(settings),
        max_running=settings.max_running,
        max_batched_tokens=settings.max_batched_tokens or _USUAL_BATCHED_TOKENS,
        max_model_len=settings.max_model_len if "max_model_len" in settings.model_fields_set else None,
        eos_token_ids=lambda: end_token_ids(path, tokenizer=settings.tokenizer or path, trust_remote_code=trusts),
    )

"""vLLM's configuration of an engine: the settings of a worker in its terms, and its complaints in one line."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from l4queue.cost.step import max_chunk_tokens
from l4queue.errors import ConfigError
from l4queue.hardware import cpu_dtype, cpu_flags
from workers.engine.vllm.environment import bind_threads
from workers.engine.vllm.serve_options import engine_options

__all__ = ("VllmOptions", "check_length", "complaint", "engine_config")

log = logging.getLogger("l4queue.worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """Wishes for an engine. `max_model_len` None: as long as the model, and its KV cache, can hold."""

    model: str
    max_model_len: int | None
    max_running: int
    dtype: str
    max_batched_tokens: int | None
    tensor_parallel: int
    gpu_memory_share: float
    vllm_args: str


def engine_config(options: VllmOptions, *, kv_transfer: Any = None) -> Any:
    """vLLM's `VllmConfig`. ConfigError where vLLM refuses it, or cannot read the model."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    is_cpu = current_platform.is_cpu()
    arguments: dict[str, Any] = {
        "model": options.model,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_running,
        "dtype": _dtype(options.dtype) if is_cpu else options.dtype,
        "scheduling_policy": "priority",
        "enable_prefix_caching": True,
        "enable_logging_iteration_details": True,
        "enforce_eager": is_cpu,
        "tensor_parallel_size": options.tensor_parallel,
        "gpu_memory_utilization": options.gpu_memory_share,
    }
    if is_cpu:
        arguments["worker_cls"] = "workers.engine.vllm.cpu.SeededCpuWorker"
        if options.tensor_parallel == 1 and bind_threads():
            arguments["distributed_executor_backend"] = "uni"
    if options.max_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = options.max_batched_tokens
    if kv_transfer is not None:
        arguments["kv_transfer_config"] = kv_transfer
    arguments |= engine_options(options.vllm_args)
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"vLLM cannot serve model {options.model!r}: {complaint(error)}") from error
    scheduling = config.scheduler_config
    longest = min(max_chunk_tokens(scheduling.max_num_batched_tokens), config.model_config.max_model_len)
    scheduling.long_prefill_token_threshold = longest
    # vLLM then bounds the longest request by the KV cache instead of ending: `check_length` sees the difference.
    config.model_config.original_max_model_len = -1
    return config


def check_length(options: VllmOptions, *, wanted_tokens: int, held_tokens: int) -> None:
    """Say that the KV cache holds no request of the wanted length; ConfigError where that was asked for."""
    if held_tokens >= wanted_tokens:
        return
    remedy = "more memory for it: L4_CPU_KV_CACHE_GIB, on a GPU L4_GPU_MEMORY_SHARE"
    if options.max_model_len is not None:
        raise ConfigError(
            f"L4_MAX_MODEL_LEN is {options.max_model_len}, and the KV cache holds {held_tokens} tokens of one "
            f"request: lower it, or give {remedy}"
        )
    log.warning(
        "the longest request has %d tokens, not the model's %d: the KV cache holds no more (%s)",
        held_tokens,
        wanted_tokens,
        remedy,
    )


def _dtype(dtype: str) -> str:
    chosen = cpu_dtype(dtype, flags=cpu_flags())
    if chosen != dtype:
        log.info(
            "dtype auto is %s: this CPU has no instructions for bfloat16, which takes half the memory", chosen
        )
    return chosen


def complaint(error: BaseException) -> str:
    """An error of vLLM in one line: pydantic's are wrapped in counts, input values and links."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        told = [str(one.get("msg", "")).removeprefix("Value error, ") for one in errors()]
        return "; ".join(told)
    return " ".join(str(error).split())

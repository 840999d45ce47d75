"""The vLLM engine behind our seam: in process, token ids in and out, step records from its scheduler."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from l4queue.errors import ConfigError
from workers.engine import (
    EngineDied,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    StepRecord,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("VllmEngine",)

_MAX_STEP_RECORDS = 4096
_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "repetition": FinishReason.STOP,
    "error": FinishReason.ERROR,
}


class VllmEngine:
    """`AsyncLLM` with chunked prefill, prefix caching and priority scheduling.

    `cpu_kv_cache_gib` sizes the cache of the CPU build; on a GPU `gpu_memory_share` does.
    """

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int,
        max_running: int,
        dtype: str = "auto",
        max_batched_tokens: int | None = None,
        gpu_memory_share: float = 0.9,
        cpu_cores: str = "",
        cpu_kv_cache_gib: int = 1,
    ) -> None:
        self._model = model
        self._max_model_len = max_model_len
        self._max_running = max_running
        self._dtype = dtype
        self._max_batched_tokens = max_batched_tokens
        self._gpu_memory_share = gpu_memory_share
        self._cpu_cores = cpu_cores
        self._cpu_kv_cache_gib = cpu_kv_cache_gib
        self._llm: Any = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._out: list[EngineOutput] = []
        self._ready = asyncio.Event()
        self._dead: str | None = None
        self._watch = _StepWatch()
        self._kv_capacity_tokens = 0

    async def start(self) -> EngineInfo:
        """Load the model; tens of seconds."""
        _prepare_environment(kv_cache_gib=self._cpu_kv_cache_gib, cores=self._cpu_cores, model=self._model)
        try:
            import vllm
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ConfigError("vLLM is missing: install l4queue[gpu] or l4queue[cpu]") from error
        arguments: dict[str, Any] = {
            "model": self._model,
            "max_model_len": self._max_model_len,
            "max_num_seqs": self._max_running,
            "dtype": self._dtype,
            "scheduling_policy": "priority",
            "enable_prefix_caching": True,
            "enable_logging_iteration_details": True,
            "enable_log_requests": False,
            "disable_log_stats": False,
            "enforce_eager": current_platform.is_cpu(),
            "gpu_memory_utilization": self._gpu_memory_share,
        }
        if self._max_batched_tokens is not None:
            arguments["max_num_batched_tokens"] = self._max_batched_tokens
        try:
            self._llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**arguments), stat_loggers=[_logger_factory(self._watch)]
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"vLLM cannot start with model {self._model!r}: {error}") from error
        config = self._llm.vllm_config
        cache = config.cache_config
        self._kv_capacity_tokens = int(cache.num_gpu_blocks or 0) * int(cache.block_size or 0)
        return EngineInfo(
            name="vllm",
            model=self._model,
            version=vllm.__version__,
            max_model_len=int(config.model_config.max_model_len),
            kv_capacity_tokens=self._kv_capacity_tokens,
            max_running=int(config.scheduler_config.max_num_seqs),
            max_batched_tokens=int(config.scheduler_config.max_num_batched_tokens),
            eos_token_ids=frozenset(self._eos_token_ids()),
        )

    async def add(self, request: EngineRequest) -> None:
        """Start a request; each has one task that moves its tokens to the shared list."""
        if self._dead is not None:
            raise EngineDied(self._dead)
        task = asyncio.create_task(self._follow(request))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Cancel their tasks: vLLM aborts a request whose generator is closed."""
        tasks = [task for i in request_ids if (task := self._tasks.pop(i, None)) is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def outputs(self) -> list[EngineOutput]:
        """All that came out since the last call, at least one."""
        await self._ready.wait()
        self._ready.clear()
        out, self._out = self._out, []
        if not out and self._dead is not None:
            self._ready.set()
            raise EngineDied(self._dead)
        if self._dead is not None:
            self._ready.set()
        return out

    def stats(self) -> EngineStats:
        """Load as of the last step."""
        watch = self._watch
        return EngineStats(
            num_running=watch.num_running,
            num_waiting=watch.num_waiting,
            kv_used_tokens=round(watch.kv_share * self._kv_capacity_tokens),
            num_steps=watch.num_steps,
            last_step_ms=watch.last_step_ms,
        )

    def step_records(self) -> list[StepRecord]:
        """Steps since the last call."""
        records = list(self._watch.records)
        self._watch.records.clear()
        return records

    async def stop(self) -> None:
        """End the engine core and its tasks."""
        await self.abort(list(self._tasks))
        llm, self._llm = self._llm, None
        if llm is not None:
            # its output handler reports the end of the core as an error, also when the end is asked for
            logging.getLogger("vllm").setLevel(logging.CRITICAL)
            await asyncio.to_thread(llm.shutdown)

    async def _follow(self, request: EngineRequest) -> None:
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        request_id = request.request_id
        num_tokens = len(request.token_ids)
        try:
            prompt = TokensPrompt(prompt_token_ids=list(request.token_ids))
            params = _sampling_params(request)
            async for out in self._llm.generate(prompt, params, request_id, priority=request.priority):
                done = out.outputs[0]
                reason = _REASONS.get(done.finish_reason or "", FinishReason.ERROR) if out.finished else None
                new = tuple(done.token_ids)
                num_tokens += len(new)
                self._watch.lengths[request_id] = num_tokens
                self._put(EngineOutput(request_id=request_id, token_ids=new, finish_reason=reason))
        except EngineDeadError as error:
            self._dead = str(error) or "the engine core died"
            self._ready.set()
        except Exception as error:  # vLLM refuses one request with many types; its neighbours go on
            refusal = EngineOutput(
                request_id=request_id, token_ids=(), finish_reason=FinishReason.ERROR, error=str(error)
            )
            self._put(refusal)
        finally:
            self._watch.lengths.pop(request_id, None)

    def _put(self, output: EngineOutput) -> None:
        self._out.append(output)
        self._ready.set()

    def _eos_token_ids(self) -> set[int]:
        found: set[int] = set()
        generation = self._llm.model_config.try_get_generation_config()
        for ids in (generation.get("eos_token_id"), getattr(self._llm.get_tokenizer(), "eos_token_id", None)):
            if ids is not None:
                found.update(ids if isinstance(ids, list) else [ids])
        return found


class _StepWatch:
    """What the last step reported, and records of the steps since they were last asked for."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_waiting = 0
        self.kv_share = 0.0
        self.num_steps = 0
        self.last_step_ms = 0.0
        self.lengths: dict[str, int] = {}
        self.records: deque[StepRecord] = deque(maxlen=_MAX_STEP_RECORDS)

    def record(self, scheduler_stats: Any) -> None:
        """Take in vLLM's SchedulerStats of one step."""
        self.num_steps += 1
        if scheduler_stats is None:
            return
        self.num_running = scheduler_stats.num_running_reqs
        self.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self.kv_share = scheduler_stats.kv_cache_usage
        details = scheduler_stats.iteration_details
        if details is None or details.is_dummy:
            return
        self.last_step_ms = details.elapsed_ms
        lengths = list(self.lengths.values())
        context = sum(lengths)
        longest = max(lengths, default=0)
        num_decodes = details.num_generation_requests
        mean = context / len(lengths) if lengths else 0.0
        chunk = details.num_ctx_tokens
        self.records.append(
            StepRecord(
                elapsed_ms=details.elapsed_ms,
                num_decodes=num_decodes,
                context_tokens=context,
                prefill_tokens=chunk,
                prefill_pairs=chunk * chunk / 2,  # vLLM does not say what the chunk attends to before itself
                skew_tokens=num_decodes * (longest - mean),
            )
        )


def _logger_factory(watch: _StepWatch) -> Callable[[Any, int], Any]:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Logger(StatLoggerBase):  # type: ignore[misc] # vLLM is imported late and untyped
        """Feeds the watch; prints nothing."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self.engine_index = engine_index

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            watch.record(scheduler_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return Logger


def _sampling_params(request: EngineRequest) -> Any:
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    params = request.params
    return VllmParams(
        max_tokens=request.max_tokens,
        min_tokens=request.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        detokenize=False,  # the worker makes the text, so that it survives a change of worker
        output_kind=RequestOutputKind.DELTA,
    )


def _prepare_environment(*, kv_cache_gib: int, cores: str, model: str) -> None:
    """Defaults for vLLM's CPU build and for an engine inside somebody else's process; the user's own win."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib))
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if cores:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    if os.path.isdir(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

"""The vLLM engine behind our seam: in process, token ids in and out, step records from its scheduler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l4queue.errors import ConfigError
from workers.engine.base import (
    Cut,
    EngineDied,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    StepRecord,
)
from workers.engine.loop_work import LoopWork
from workers.engine.vllm.configure import VllmOptions, check_length, complaint, engine_config
from workers.engine.vllm.constraints import ConstraintExaminer
from workers.engine.vllm.environment import prepare_environment
from workers.engine.vllm.prefill_gate import PrefillGate
from workers.engine.vllm.rehearsal import rehearsals
from workers.engine.vllm.stat_loggers import drop_metrics, step_logger
from workers.engine.vllm.step_recorder import StepWatch
from workers.engine.vllm.translate import cached_prompt, engine_output, failed, prompt, sampling_params
from workers.kv.frontend import KVFrontend, model_fingerprint
from workers.kv.movable import kv_bytes_per_token
from workers.kv.store import SegmentStore

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

__all__ = ("VllmEngine",)

log = logging.getLogger("l4queue.worker")
_HEALTH_INTERVAL_S = 0.5  # between two looks whether the engine's process lives


@dataclass(slots=True, kw_only=True)
class _Running:
    """A request in the engine: length up to the last token seen, logprobs of each, where its tokens come out.

    `examined` is the request in vLLM's own terms where that was made beforehand, off the event loop.
    """

    length_tokens: int
    num_top: int | None
    is_prefilled: bool = False
    examined: Any = None
    collector: Any = None


class VllmEngine:
    """`AsyncLLM` with chunked prefill, prefix caching and priority scheduling.

    `cpu_kv_cache_gib` sizes the cache of the CPU build; on a GPU `gpu_memory_share` does. With a `kv_directory`,
    requests are handed over with their KV through segments there, at most `kv_handover_bytes` of them. None: what
    they need and memory affords. All engines of the host that name the same directory exchange with each other.
    Without, vLLM gets no connector.
    vLLM has `constraint_limit_s` to accept a request with structured outputs; it does so in a thread.
    Without `keep_metrics` vLLM does not keep its own for Prometheus, which cost it time at every token.

    Tokens are collected once for every step, when vLLM reports it to our logger: a task for each request, as
    `AsyncLLM.generate` needs one, would be woken for each token.
    """

    def __init__(
        self,
        model: str,
        *,
        max_running: int,
        max_model_len: int | None = None,
        dtype: str = "auto",
        max_batched_tokens: int | None = None,
        tensor_parallel: int = 1,
        gpu_memory_share: float = 0.9,
        vllm_args: str = "",
        cpu_cores: str = "",
        cpu_kv_cache_gib: int = 1,
        kv_directory: Path | None = None,
        kv_handover_bytes: int | None = None,
        keep_metrics: bool = True,
        work: LoopWork | None = None,
        constraint_limit_s: float = 20.0,
    ) -> None:
        self._options = VllmOptions(
            model=model,
            max_model_len=max_model_len,
            max_running=max_running,
            dtype=dtype,
            max_batched_tokens=max_batched_tokens,
            tensor_parallel=tensor_parallel,
            gpu_memory_share=gpu_memory_share,
            vllm_args=vllm_args,
        )
        self._cpu_cores = cpu_cores
        self._cpu_kv_cache_gib = cpu_kv_cache_gib
        self._kv_frontend: KVFrontend | None = None
        if kv_directory is not None and kv_handover_bytes != 0 and tensor_parallel == 1:
            self._kv_frontend = KVFrontend(SegmentStore(kv_directory, limit_bytes=kv_handover_bytes))
        self._keep_metrics = keep_metrics
        self._work = work or LoopWork()
        self._examiner = ConstraintExaminer(limit_s=constraint_limit_s)
        self._llm: Any = None
        self._running: dict[str, _Running] = {}
        self._out: list[EngineOutput] = []
        self._ready = asyncio.Event()
        self._dead: str | None = None
        self._watch = StepWatch(max_chunk_tokens=0)
        self._prefill_gate = PrefillGate(max_batched_tokens=0, max_chunk_tokens=0)
        self._beginning: set[asyncio.Task[None]] = set()
        self._health: asyncio.Task[None] | None = None
        self._kv_capacity_tokens = 0
        self._kv_bytes_per_token = 0

    async def start(self) -> EngineInfo:
        """Load the model; tens of seconds."""
        options = self._options
        prepare_environment(kv_cache_gib=self._cpu_kv_cache_gib, cores=self._cpu_cores, model=options.model)
        try:
            import vllm
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ConfigError("vLLM is missing: install l4queue[gpu] or l4queue[cpu]") from error
        transfer = None
        if self._kv_frontend is not None:
            self._kv_frontend.open()
            transfer = self._transfer_config(self._kv_frontend, vllm.__version__)
        config = engine_config(options, kv_transfer=transfer)
        scheduling = config.scheduler_config
        budget, longest = scheduling.max_num_batched_tokens, scheduling.long_prefill_token_threshold
        self._watch = StepWatch(max_chunk_tokens=longest)
        self._prefill_gate = PrefillGate(max_batched_tokens=budget, max_chunk_tokens=longest)
        wanted = int(config.model_config.max_model_len)
        try:
            self._llm = AsyncLLM.from_vllm_config(config, stat_loggers=[step_logger(self._stepped)])
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineDied(f"vLLM does not start with model {options.model!r}: {complaint(error)}") from error
        if not self._keep_metrics:
            drop_metrics(self._llm.logger_manager)
        self._llm.output_handler.add_done_callback(lambda _: self._ready.set())
        self._health = asyncio.create_task(self._watch_health())
        cache = config.cache_config
        self._kv_capacity_tokens = int(cache.num_gpu_blocks or 0) * int(cache.block_size or 0)
        self._kv_bytes_per_token = kv_bytes_per_token(config) if self._kv_frontend is not None else 0
        if self._kv_frontend is not None and self._kv_bytes_per_token:
            held = min(int(config.model_config.max_model_len), self._kv_capacity_tokens)
            self._kv_frontend.declare(longest_tokens=held, kv_bytes_per_token=self._kv_bytes_per_token)
        check_length(options, wanted_tokens=wanted, held_tokens=int(config.model_config.max_model_len))
        await self._rehearse()
        return EngineInfo(
            name="vllm",
            model=options.model,
            version=vllm.__version__,
            max_model_len=int(config.model_config.max_model_len),
            kv_capacity_tokens=self._kv_capacity_tokens,
            max_running=int(scheduling.max_num_seqs),
            max_batched_tokens=int(budget),
            eos_token_ids=frozenset(self._eos_token_ids()),
            kv_bytes_per_token=self._kv_bytes_per_token,
            has_prefix_cache=bool(cache.enable_prefix_caching),
        )

    async def _rehearse(self) -> None:
        """Run requests of every kind, and forget them. Raises EngineDied where one of them ends the engine."""
        for group in rehearsals():
            for request in group:
                await self.add(request)
            while self._running:
                for output in await self.outputs():
                    if output.error is not None:
                        log.warning("%s failed, and so will others: %s", output.request_id, output.error)
        self._watch.take_records()

    async def add(self, request: EngineRequest) -> None:
        """Start a request, a long prompt when it is its turn.

        What vLLM refuses ends with an error among the outputs; its neighbours go on.
        """
        if self._dead is not None:
            raise EngineDied(self._dead)
        request_id, num_tokens = request.request_id, len(request.token_ids)
        if request_id in self._running:
            raise ValueError(f"request {request_id} is in the engine already")
        running = _Running(length_tokens=num_tokens, num_top=request.params.logprobs)
        self._running[request_id] = running
        if request.params.structured_outputs is not None:
            self._start(self._examine_and_begin(request, running))
        elif self._prefill_gate.arrived(request):
            await self._begin(request)

    async def _examine_and_begin(self, request: EngineRequest, running: _Running) -> None:
        """Have vLLM look at a constraint before the request takes its turn: it may take seconds."""
        try:
            running.examined = await self._examiner.examine(self._llm, request)
        except Exception as error:  # it refuses with many types
            self._not_begun(request.request_id, running, error, field="structured_outputs")
            return
        if self._running.get(request.request_id) is running and self._prefill_gate.arrived(request):
            await self._begin(request)

    async def _begin(self, request: EngineRequest) -> None:
        request_id = request.request_id
        running = self._running.get(request_id)
        if running is None:  # aborted just when its turn had come
            return
        try:
            asked = running.examined or prompt(request)
            params = running.examined.sampling_params if running.examined else sampling_params(request)
            if self._kv_frontend is not None:
                params.extra_args = {"kv_transfer_params": self._kv_frontend.admit(request_id, request.kv)}
            self._watch.arrived(request_id, num_tokens=len(request.token_ids), priority=request.priority)
            adding = self._llm.add_request(request_id, asked, params, priority=request.priority)
            found = await self._work.steps(request_id, adding)
        except Exception as error:  # it refuses with many types
            self._not_begun(request_id, running, error)
        else:
            running.collector = found
            if self._running.get(request_id) is not running:  # aborted while it was on its way
                await self._llm.abort([request_id])

    def _not_begun(self, request_id: str, running: _Running, error: Exception, *, field: str = "") -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, EngineDeadError):
            self._died(str(error))
        elif self._running.get(request_id) is running:
            why = str(error) or repr(error.__cause__ or error)
            self._end(failed(request_id, why, field=field or str(getattr(error, "parameter", None) or "")))

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Forget them; their outputs that nobody has seen are dropped."""
        gone = [i for i in dict.fromkeys(request_ids) if i in self._running]
        for request_id in gone:
            self._forget(request_id)
        if gone and self._dead is None:
            await self._llm.abort(gone)
        self._out = [output for output in self._out if output.request_id not in gone]

    async def cut(self, request_id: str) -> Cut | None:
        """Abort it with its blocks kept, and wait until they are copied."""
        if self._dead is not None:
            raise EngineDied(self._dead)
        if request_id not in self._running:
            return None
        ticket = (
            self._kv_frontend.begin_cut(request_id)
            if self._kv_frontend is not None and self._kv_bytes_per_token
            else ""
        )
        await self.abort([request_id])
        if self._kv_frontend is None or not ticket:
            return Cut()
        return Cut(kv=await self._kv_frontend.finish_cut(ticket))

    async def outputs(self) -> list[EngineOutput]:
        """All that came out since the last call, at least one."""
        self._collect()
        while not self._out:
            if self._dead is not None:
                raise EngineDied(self._dead)
            self._ready.clear()
            await self._ready.wait()
            self._collect()
        out, self._out = self._out, []
        return out

    def stats(self) -> EngineStats:
        """Load as of the last step."""
        watch, kv = self._watch, self._kv_frontend
        return EngineStats(
            num_running=watch.num_running,
            num_waiting=watch.num_waiting + len(self._prefill_gate),
            kv_used_tokens=round(watch.kv_share * self._kv_capacity_tokens),
            num_steps=watch.num_steps,
            last_step_ms=watch.last_step_ms,
            num_preemptions=watch.num_preemptions,
            num_kv_loads=kv.num_loads if kv else 0,
            num_kv_misses=kv.num_misses if kv else 0,
            kv_loaded_bytes=kv.loaded_bytes if kv else 0,
            kv_budget_bytes=kv.budget_bytes if kv else None,
            kv_bytes_per_s=kv.bytes_per_s if kv else 0.0,
        )

    def kv_room_bytes(self) -> int | None:
        """Room left in the segment directory of the host."""
        return self._kv_frontend.room_bytes() if self._kv_frontend is not None else None

    def step_records(self) -> list[StepRecord]:
        """Steps since the last call."""
        return self._watch.take_records()

    async def stop(self) -> None:
        """End the engine core and its tasks."""
        if self._health is not None:
            self._health.cancel()
        await self.abort(list(self._running))
        llm, self._llm = self._llm, None
        if llm is not None:
            # its output handler reports the end of the core as an error, also when the end is asked for
            logging.getLogger("vllm").setLevel(logging.CRITICAL)
            await asyncio.to_thread(llm.shutdown)
        if self._kv_frontend is not None:
            self._kv_frontend.close()

    def _collect(self) -> None:
        """Move what the last steps gave to the shared list."""
        for request_id, running in list(self._running.items()):
            if running.collector is None:
                continue
            try:
                out = running.collector.get_nowait()
            except Exception as error:  # the core is dead or vLLM's reader of its outputs is: none will get more
                self._died(str(error))
                return
            if out is None:
                continue
            done = out.outputs[0]
            if done.finish_reason == "abort":  # not by us: a core told to end by a signal aborts everything
                self._died("the engine core was told to end")
                return
            running.length_tokens += len(done.token_ids)
            self._watch.grew(request_id, length_tokens=running.length_tokens)
            self._through(request_id)
            if self._kv_frontend is not None:
                self._kv_frontend.started(request_id)
            cached = None if running.is_prefilled else cached_prompt(out)
            running.is_prefilled = True
            output = engine_output(request_id, done, num_top=running.num_top, cached=cached)
            if output.finish_reason is None:
                self._out.append(output)
            else:
                self._end(output)

    async def _watch_health(self) -> None:
        """See the core's end also while no request runs that would be told."""
        while not self._llm.errored:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            if self._kv_frontend is not None:
                self._kv_frontend.sweep(asyncio.get_running_loop().time())
        self._died("")

    def _stepped(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """A step is over; its tokens are with their collectors."""
        self._watch.record(scheduler_stats, iteration_stats)
        if self._kv_frontend is not None and scheduler_stats is not None and scheduler_stats.kv_connector_stats:
            self._kv_frontend.take(scheduler_stats.kv_connector_stats)
        self._ready.set()

    def _died(self, why: str) -> None:
        self._dead = self._dead or why or "the engine core died"
        if self._kv_frontend is not None:
            self._kv_frontend.engine_died()
        self._ready.set()

    def _end(self, output: EngineOutput) -> None:
        self._forget(output.request_id)  # its reader may use the id again
        self._out.append(output)
        self._ready.set()

    def _through(self, request_id: str) -> None:
        """Its prefill is over, if it had one: what waited for that may begin."""
        for following in self._prefill_gate.over(request_id):
            self._start(self._begin(following))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        beginning = asyncio.create_task(work)
        self._beginning.add(beginning)
        beginning.add_done_callback(self._beginning.discard)

    def _forget(self, request_id: str) -> None:
        del self._running[request_id]
        self._through(request_id)
        self._watch.left(request_id)
        if self._kv_frontend is not None:
            self._kv_frontend.left(request_id)

    def _transfer_config(self, kv_frontend: KVFrontend, version: str) -> Any:
        from vllm.config import KVTransferConfig

        facts = model_fingerprint(self._options.model, self._options.dtype, version, self._options.vllm_args)
        return KVTransferConfig(**kv_frontend.connector_config(facts))

    def _eos_token_ids(self) -> set[int]:
        found: set[int] = set()
        generation = self._llm.model_config.try_get_generation_config()
        for ids in (generation.get("eos_token_id"), getattr(self._llm.get_tokenizer(), "eos_token_id", None)):
            if ids is not None:
                found.update(ids if isinstance(ids, list) else [ids])
        return found

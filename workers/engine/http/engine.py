"""The engine of a running server behind our seam: token ids over HTTP, one connection for each request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from l4queue.engine_server import EngineServer
from l4queue.errors import ConfigError, ServiceUnavailable
from l4queue.protocol.records import CachedPrompt
from workers.engine.base import (
    Cut,
    EngineDied,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    StepRecord,
)
from workers.engine.http.arrivals import ArrivalWatch
from workers.engine.http.connection import (
    BrokenStream,
    ServerBusy,
    ServerConnection,
    ServerRefusal,
    ServerState,
)
from workers.engine.http.gauges import ServerGauges, read_gauges
from workers.engine.http.probe import keeps_constraints
from workers.engine.http.translate import BrokenEvent, cached_of, completion_body, output_of, refused

__all__ = ("HttpEngine",)

log = logging.getLogger("l4queue.worker")
_ASK_S = (
    1.0  # between two looks at the server's metrics, which cost it 5 ms (measured, vLLM 0.32, one core of a Xeon)
)
_SAY_S = 60.0  # between two log lines while there is no server
_SILENT_S = 20.0
"""How long a server may give no answer before its requests go elsewhere, s. Chosen: twice the limit of one."""
_BUSY_S = 0.5  # before a request that the server did not take is sent again
_USAGE_S = 1.0  # longest wait for the event behind the last tokens. Chosen: vLLM sends it at once
_FATAL = (401, 403, 404)  # the key, the model or the endpoint is gone: no request will do better
_GAUGES = ServerGauges(
    kv_capacity_tokens=0,
    num_running=0,
    num_waiting=0,
    kv_share=0.0,
    num_steps=0,
    num_preemptions=0,
    is_speculating=False,
)
"""Before the first look."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Stream:
    """A request in the server and the task that reads its tokens."""

    request: EngineRequest
    task: asyncio.Task[None] | None = None


class HttpEngine:
    """One `vllm serve` at `url`, whose model goes by one of `model_names` there.

    `describe` asks the server what it is, and blocks. `max_running` and `max_batched_tokens` are the server's,
    which it does not tell. `max_model_len` bounds requests below what it holds. KV caches stay where they are.
    """

    def __init__(
        self,
        url: str,
        *,
        describe: Callable[[], EngineServer],
        model_names: tuple[str, ...],
        headers: dict[str, str],
        max_running: int,
        max_batched_tokens: int,
        max_model_len: int | None = None,
        eos_token_ids: Callable[[], frozenset[int]] = frozenset,
    ) -> None:
        self._describe = describe
        self._model_names = model_names
        self._max_running = max_running
        self._max_batched_tokens = max_batched_tokens
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._server = ServerConnection(url, headers)
        self._model = ""
        self._has_constraints = False
        self._streams: dict[str, _Stream] = {}
        self._out: list[EngineOutput] = []
        self._ready = asyncio.Event()
        self._dead: EngineDied | None = None
        self._state: asyncio.Task[ServerState] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._gauges, self._held_then_tokens = _GAUGES, 0
        self._heard_s = 0.0  # when the server last gave metrics or tokens

    async def start(self) -> EngineInfo:
        """Wait for the server and see what it can; ConfigError where it is not what was asked for."""
        loop = asyncio.get_running_loop()
        self._watch = ArrivalWatch(max_batched_tokens=self._max_batched_tokens, clock=loop.time)
        self._server.open()
        described = await self._met()
        card = described.card(self._model_names)
        self._model = card.name
        self._gauges = await self._first_gauges()
        capacity_tokens = self._gauges.kv_capacity_tokens
        if not capacity_tokens:
            raise ConfigError(
                f"the server at {described.url} tells nothing of its KV cache in /metrics: start it without "
                "--disable-log-stats"
            )
        self._has_constraints = await keeps_constraints(self._server, model=card.name, version=described.version)
        self._watch.is_speculating = self._gauges.is_speculating
        self._asking = asyncio.create_task(self._ask_for_ever())
        return EngineInfo(
            name="http",
            model=card.name,
            version=f"vLLM {described.version} at {described.url}",
            max_model_len=self._longest(card.max_model_len, capacity_tokens),
            kv_capacity_tokens=capacity_tokens,
            max_running=self._max_running,
            max_batched_tokens=self._max_batched_tokens,
            eos_token_ids=await asyncio.to_thread(self._eos_token_ids),
            has_prefix_cache=self._gauges.has_prefix_cache,
        )

    async def _first_gauges(self) -> ServerGauges:
        try:
            text = await self._server.metrics()
        except ConnectionRefusedError:
            text = None
        if text is None:
            raise EngineDied(f"the server at {self._server.url} does not answer any more", is_blameless=True)
        return read_gauges(text)

    async def _met(self) -> EngineServer:
        """The server, once it answers."""
        loop = asyncio.get_running_loop()
        said_s = -_SAY_S
        while True:
            try:
                return await asyncio.to_thread(self._describe)
            except ServiceUnavailable as error:
                if loop.time() - said_s >= _SAY_S:
                    log.warning("waiting for the engine's server: %s", error)
                    said_s = loop.time()
            await asyncio.sleep(_ASK_S)

    def _longest(self, served_tokens: int, capacity_tokens: int) -> int:
        held_tokens = min(served_tokens or capacity_tokens, capacity_tokens)
        if self._max_model_len is not None and self._max_model_len > held_tokens:
            raise ConfigError(
                f"L4_MAX_MODEL_LEN is {self._max_model_len}, and the server at {self._server.url} holds "
                f"{held_tokens} tokens of one request: lower it, or give the server more"
            )
        return self._max_model_len or held_tokens

    async def add(self, request: EngineRequest) -> None:
        """Send a request; what the server refuses ends with an error among the outputs."""
        if self._dead is not None:
            raise self._dead
        request_id = request.request_id
        if request_id in self._streams:
            raise ValueError(f"request {request_id} is in the engine already")
        if request.params.structured_outputs is not None and not self._has_constraints:
            why = f"the server at {self._server.url} ignores structured outputs"
            self._put(refused(request_id, why, field="structured_outputs"))
            return
        if not request.token_ids:
            self._put(refused(request_id, "the prompt is empty", field="prompt"))
            return
        stream = self._streams[request_id] = _Stream(request=request)
        self._watch.sent(request_id, num_tokens=len(request.token_ids))
        stream.task = asyncio.create_task(self._serve(stream))
        stream.task.add_done_callback(self._served)

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Close their connections; tokens that nobody has seen are dropped."""
        gone = [i for i in dict.fromkeys(request_ids) if i in self._streams]
        tasks = [task for i in gone if (task := self._forget(i).task) is not None]
        for task in tasks:
            task.cancel()
        self._out = [output for output in self._out if output.request_id not in gone]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def cut(self, request_id: str) -> Cut | None:
        """Abort it; its KV stays in the server's prefix cache only."""
        if self._dead is not None:
            raise self._dead
        if request_id not in self._streams:
            return None
        await self.abort([request_id])
        return Cut()

    async def outputs(self) -> list[EngineOutput]:
        """All that came out since the last call, at least one."""
        while not self._out:
            if self._dead is not None:
                raise self._dead
            self._ready.clear()
            await self._ready.wait()
        out, self._out = self._out, []
        return out

    def stats(self) -> EngineStats:
        """Load as of the last look at the server, and what this worker has added since."""
        gauges, watch = self._gauges, self._watch
        grown_tokens = watch.held_tokens - self._held_then_tokens
        used_tokens = round(gauges.kv_share * gauges.kv_capacity_tokens) + grown_tokens
        return EngineStats(
            num_running=gauges.num_running,
            num_waiting=gauges.num_waiting,
            kv_used_tokens=max(0, min(used_tokens, gauges.kv_capacity_tokens)),
            num_steps=max(watch.num_steps, gauges.num_steps),
            last_step_ms=watch.last_step_ms,
            num_preemptions=gauges.num_preemptions,
        )

    def kv_room_bytes(self) -> None:
        """Its requests move without KV."""

    def step_records(self) -> list[StepRecord]:
        """Steps since the last call, as far as tokens tell of them."""
        return self._watch.take_records()

    async def stop(self) -> None:
        """Close all connections; the server goes on."""
        await self.abort(list(self._streams))
        tasks = [task for task in (self._asking, self._state) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.close()

    async def _serve(self, stream: _Stream) -> None:
        """Send a request until the server takes it, and read its tokens to the end."""
        request = stream.request
        body = completion_body(request, model=self._model)
        while True:
            try:
                await self._read(stream, body)
                return
            except ServerBusy:
                await asyncio.sleep(_BUSY_S)
            except ServerRefusal as error:
                if error.status in _FATAL:
                    self._died(f"the server at {self._server.url} refuses: {error}", is_blameless=True)
                else:
                    self._end(refused(request.request_id, str(error), field=_ours(error.field)))
                return
            except BrokenEvent as error:
                why = f"the server at {self._server.url} sent an event that cannot be read: {error}"
                self._end(refused(request.request_id, why))
                return
            except BrokenStream as error:
                await self._lost(request.request_id, str(error))
                return

    def _served(self, task: asyncio.Task[None]) -> None:
        """A request that failed in a way that nobody foresaw would wait for ever."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a request to the server failed", exc_info=error)
            self._died(f"a request to the server failed: {error!r}", is_blameless=False)

    async def _read(self, stream: _Stream, body: dict[str, object]) -> None:
        request_id, num_top = stream.request.request_id, stream.request.params.logprobs
        async with aclosing(self._server.events(body)) as events:
            async for event in events:
                output = output_of(request_id, event, num_top=num_top)
                if output is None:
                    continue
                self._heard_s = asyncio.get_running_loop().time()
                if output.token_ids:
                    self._watch.came(request_id, num_tokens=len(output.token_ids))
                if output.finish_reason is FinishReason.LOST:
                    raise BrokenStream("the server has aborted it")
                if output.finish_reason is not None:
                    self._end(replace(output, cached=await _usage(events)))
                    return
                self._put(output)

    async def _lost(self, request_id: str, why: str) -> None:
        """A stream has broken: the engine is gone, or this request alone is."""
        if self._state is None or self._state.done():
            self._state = asyncio.create_task(self._server.state())
        state = await asyncio.shield(self._state)
        if state is not ServerState.WELL:
            is_blameless = state is ServerState.SILENT
            self._died(f"the server at {self._server.url} is {state}: {why}", is_blameless=is_blameless)
            return
        log.warning("%s was lost by a server that is well: %s", request_id, why)
        self._end(EngineOutput(request_id=request_id, token_ids=(), finish_reason=FinishReason.LOST))

    async def _ask_for_ever(self) -> None:
        """Look at the server's state, also while no request runs that would tell of its end."""
        loop = asyncio.get_running_loop()
        self._heard_s = loop.time()
        while self._dead is None:
            await asyncio.sleep(_ASK_S)
            try:
                text = await self._server.metrics()
            except ConnectionRefusedError as error:
                self._died(f"no server at {self._server.url} any more: {error.strerror}", is_blameless=False)
                return
            if text:
                self._gauges, self._held_then_tokens = read_gauges(text), self._watch.held_tokens
                self._heard_s = loop.time()
            elif loop.time() - self._heard_s > _SILENT_S:
                why = f"nothing from the server at {self._server.url} for {loop.time() - self._heard_s:.0f} s"
                self._died(why, is_blameless=True)

    def _died(self, why: str, *, is_blameless: bool) -> None:
        self._dead = self._dead or EngineDied(why, is_blameless=is_blameless)
        self._ready.set()

    def _put(self, output: EngineOutput) -> None:
        self._out.append(output)
        self._ready.set()

    def _end(self, output: EngineOutput) -> None:
        self._forget(output.request_id)  # its reader may use the id again
        self._put(output)

    def _forget(self, request_id: str) -> _Stream:
        self._watch.left(request_id)
        return self._streams.pop(request_id)


async def _usage(events: AsyncIterator[dict[str, Any]]) -> CachedPrompt | None:
    """What the event behind the last tokens tells of the prefix cache; the request is whole without it."""
    with suppress(BrokenStream, ServerBusy, ServerRefusal, TimeoutError):
        async with asyncio.timeout(_USAGE_S):
            async for event in events:
                return cached_of(event)
    return None


def _ours(parameter: str) -> str:
    """A parameter of the server as the field of a request."""
    return {"prompt_token_ids": "prompt", "input_tokens": "prompt"}.get(parameter, parameter)

"""vLLM's `EngineClient` whose engine is the queue: token ids are enqueued, and the output stream is read.

vLLM's own processors do here what they do in its server: check parameters, fan out `n`, make text from ids, find
stop strings, name the tokens of logprobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from gateway.exchange import CURRENT, Exchange, begin
from gateway.limits import Limiter
from gateway.pieces import Piece, pieces_of
from gateway.refusals import HttpRefusal, refusal_of
from gateway.serving_check import ServingCheck
from gateway.translate import core_output, options_of
from l4queue.client import AsyncClient, AsyncHandle
from l4queue.client.arguments import build_spec
from l4queue.client.batch.halves import Half
from l4queue.errors import InvalidRequest, L4QueueError, RequestFailed
from l4queue.models import RequestSpec

__all__ = ("QueueEngine",)

_TASKS = ("generate",)
_WENT_AWAY = "its HTTP client went away"
_NOTHING = Piece(token_ids=())


@dataclass(slots=True, kw_only=True)
class _Output:
    """One output of a request: its number in the exchange, vLLM's request, our handle, and what it does next."""

    number: int
    core: Any
    spec: RequestSpec
    handle: AsyncHandle | None = None
    pieces: AsyncGenerator[Piece, None] | None = None


@dataclass(slots=True, kw_only=True)
class _Run:
    """One call of `generate`: its outputs, and where vLLM collects what comes of them."""

    exchange: Exchange
    collector: RequestOutputCollector
    outputs: list[_Output] = field(default_factory=list)


class QueueEngine(EngineClient):  # type: ignore[misc] # vLLM is untyped here
    """The queue as vLLM's server sees an engine. Belongs to one event loop."""

    def __init__(self, config: Any, client: AsyncClient, serving: ServingCheck, limiter: Limiter) -> None:
        self.vllm_config = config
        self.model_config = config.model_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self._outputs = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self._client = client
        self._serving = serving
        self._limiter = limiter
        self._is_stopping = False
        self._errands: set[asyncio.Task[None]] = set()

    @property
    def is_running(self) -> bool:
        return not self._is_stopping

    @property
    def is_stopped(self) -> bool:
        return self._is_stopping

    @property
    def errored(self) -> bool:
        return False  # an outage is told to each request; the server stays

    @property
    def dead_error(self) -> Any:
        return EngineDeadError()

    async def get_supported_tasks(self) -> Any:
        return _TASKS

    async def check_health(self) -> None:
        """EngineDeadError, which the server makes a 503, where no worker serves or Redis is away."""
        try:
            await self._serving.check()
        except L4QueueError as error:
            raise EngineDeadError(str(error)) from error

    def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        priority: int = 0,
        **_: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one prompt as they come; requests in the queue are cancelled when its reader goes away.

        The order of calls numbers the outputs of an exchange, so this is no generator, but returns one.
        """
        exchange = CURRENT.get() or begin({}, {}, caller="")
        numbers = exchange.next_outputs(sampling_params.n or 1)
        adapter = getattr(lora_request, "lora_name", "")
        return self._generate(
            exchange, numbers, prompt, sampling_params, request_id, priority=priority, adapter=adapter
        )

    async def _generate(
        self,
        exchange: Exchange,
        numbers: range,
        prompt: Any,
        params: Any,
        request_id: str,
        *,
        priority: int,
        adapter: str,
    ) -> AsyncGenerator[RequestOutput, None]:
        run: _Run | None = None
        tasks: list[asyncio.Task[None]] = []
        is_over = False
        try:
            if adapter:
                raise InvalidRequest(f"the adapter {adapter} is not offered by this server", field="model")
            run = self._prepare(exchange, numbers, prompt, params, request_id, priority=priority)
            await self._limiter.charge(exchange, {output.number: output.spec for output in run.outputs})
            await self._enqueue(run)
            for step in range(2):  # what the client has: up to its last event, and what that was made of
                await self._replay(run, step)
                while (found := run.collector.get_nowait()) is not None:
                    yield self._given(run, found)
            is_over = self._is_drained(run)
            if not is_over:
                tasks = [asyncio.create_task(self._follow(run, output)) for output in run.outputs]
            while not is_over:
                found = run.collector.get_nowait() or await run.collector.get()
                is_over = found.finished
                yield self._given(run, found)
            exchange.taken(len(numbers))
        except L4QueueError as error:
            exchange.refusal = refusal_of(error)
            raise _told(exchange.refusal) from error
        except VLLMClientError as error:  # what vLLM's own checks refuse
            field = getattr(error, "parameter", None)
            exchange.refusal = HttpRefusal(status=HTTPStatus.BAD_REQUEST, message=str(error), field=field)
            raise
        finally:
            if not is_over:
                for task in tasks:
                    task.cancel()
                if run is not None:
                    self._abandon(run)
            if exchange.charged and (is_over or run is None or not self._outlives_its_reader(run)):
                self._errand(self._limiter.settle(exchange, numbers))

    def _prepare(
        self, exchange: Exchange, numbers: range, prompt: Any, params: Any, request_id: str, *, priority: int
    ) -> _Run:
        """Have vLLM check the request and make its outputs; constraints are left to the dispatcher's check."""
        bare = copy(params)
        bare.structured_outputs = None
        core = self.input_processor.process_inputs(request_id, prompt, bare, _TASKS)
        if core.prompt_token_ids is None or core.prompt_embeds is not None or core.mm_features:
            raise InvalidRequest("is not offered beyond text and token ids", field="prompt")
        exchange.num_prompt_tokens += len(core.prompt_token_ids)
        self.input_processor.assign_request_id(core)
        checked = core.sampling_params
        run = _Run(exchange=exchange, collector=RequestOutputCollector(checked.output_kind, core.request_id))
        parent = ParentRequest(core) if len(numbers) > 1 else None
        for index, number in enumerate(numbers):
            child = copy(core)
            if parent is not None:
                child.request_id, child.sampling_params = parent.get_child_info(index)
            spec = self._spec(exchange, number, child, params.structured_outputs, priority=priority)
            run.outputs.append(_Output(number=number, core=child, spec=spec))
        if exchange.half is Half.REQUEST:
            exchange.asked = run.outputs[0].spec
            raise GracefulHTTPError("only the request is wanted", HTTPStatus.OK)
        for index, output in enumerate(run.outputs):
            self._outputs.add_request(output.core, None, parent, index, run.collector)
            state = self._outputs.request_states[output.core.request_id]
            state.num_cached_tokens = state.num_cache_creation_tokens = None  # not known yet
        return run

    def _spec(self, exchange: Exchange, number: int, core: Any, constraint: Any, *, priority: int) -> RequestSpec:
        params = copy(core.sampling_params)
        params.structured_outputs = constraint
        options = options_of(params)
        room_tokens = self.model_config.max_model_len - len(core.prompt_token_ids)
        if exchange.has_open_end and params.max_tokens == room_tokens:
            del options["max_tokens"]  # the dispatcher fits it, and admission does not count all of it
        return build_spec(
            token_ids=list(core.prompt_token_ids),
            priority=priority if exchange.priority is None else exchange.priority,
            deadline_s=exchange.deadline_s,
            idempotency_key=exchange.key_of(number),
            traceparent=exchange.traceparent,
            **options,
        )

    async def _enqueue(self, run: _Run) -> None:
        exchange = run.exchange
        sending = asyncio.create_task(self._handles(run))
        try:
            handles = await asyncio.shield(sending)
        except asyncio.CancelledError:
            self._errand(self._cancel_sent(run, sending))
            raise
        except L4QueueError as error:
            self._errand(self._cancel(list(error.accepted)))
            raise
        for output, handle in zip(run.outputs, handles, strict=True):
            output.handle = handle
            exchange.request_ids[output.number] = handle.id
            output.pieces = pieces_of(handle, cuts=[tokens for tokens, _ in exchange.cuts_of(output.number)])

    async def _handles(self, run: _Run) -> list[AsyncHandle]:
        """Requests in the queue for these outputs: enqueued, or the one that is to be answered."""
        exchange = run.exchange
        if exchange.half is Half.ANSWER:
            return [await self._client.get(exchange.base)]
        return await self._client.enqueue_as({exchange.id_of(one.number): one.spec for one in run.outputs})

    async def _replay(self, run: _Run, step: int) -> None:
        """Take in what the client has already, cut where it was cut for it."""
        for output in run.outputs:
            cuts = ((0, False), *run.exchange.cuts_of(output.number))
            (num_before, had_end), (num_tokens, has_end) = cuts[step : step + 2]
            if num_tokens > num_before and output.pieces is not None:
                self._take_in(output, await anext(output.pieces))
            if has_end and not had_end and self._is_open(output):
                self._take_in(output, _NOTHING, ends=await self._ends(output))

    async def _follow(self, run: _Run, output: _Output) -> None:
        """Take in one output until its end. An error ends all of the run."""
        assert output.handle is not None
        assert output.pieces is not None
        try:
            async for piece in output.pieces:
                if not self._is_open(output):  # vLLM has found a stop string that the worker has not
                    await output.handle.cancel(reason="a stop string ended it")
                    return
                self._take_in(output, piece)
            if self._is_open(output):
                self._take_in(output, _NOTHING, ends=await self._ends(output))
        except L4QueueError as error:
            if self._is_open(output):
                run.collector.put(error)

    def _is_open(self, output: _Output) -> bool:
        return bool(self._outputs.has_request(output.core.request_id))

    def _is_drained(self, run: _Run) -> bool:
        return not any(self._is_open(output) for output in run.outputs)

    def _take_in(self, output: _Output, piece: Piece, *, ends: tuple[str, int | None] | None = None) -> None:
        request_id = output.core.request_id
        core = core_output(request_id, piece.token_ids, piece.logprobs, cached=piece.cached, ends=ends)
        self._outputs.process_outputs([core])

    async def _ends(self, output: _Output) -> tuple[str, int | None]:
        """Why it ended, and the stop token that ended it, as vLLM's engine core tells them."""
        assert output.handle is not None
        record = await output.handle.status()
        reason = record.finish_reason or "stop"
        if reason not in ("stop", "length"):
            raise RequestFailed(f"request {record.request_id} ended: {reason}", request_id=record.request_id)
        state = self._outputs.request_states[output.core.request_id]
        if state.num_cached_tokens is None:  # some engines tell it with the end
            state.num_cached_tokens = record.cached_tokens
        ids, params = state.detokenizer.output_token_ids, output.core.sampling_params
        last = ids[-1] if ids and reason == "stop" else None
        if last == params.eos_token_id or last not in (params.stop_token_ids or ()):
            return reason, None
        return reason, last

    def _given(self, run: _Run, found: RequestOutput) -> RequestOutput:
        """Note output that goes to the server, in an order that a stream which is taken up has, too."""
        found.outputs.sort(key=lambda one: one.index)
        first = run.outputs[0].number
        given = {first + one.index: (len(one.token_ids), one.finish_reason is not None) for one in found.outputs}
        run.exchange.advance(given)
        return found

    def _abandon(self, run: _Run) -> None:
        """Forget a run that its reader left; cancel its requests unless somebody may come back for them."""
        self._outputs.abort_requests([output.core.request_id for output in run.outputs], internal=True)
        if not self._outlives_its_reader(run):
            handles = [output.handle for output in run.outputs if output.handle is not None]
            self._errand(self._cancel(handles))

    def _outlives_its_reader(self, run: _Run) -> bool:
        return run.exchange.is_detached or self._is_stopping

    async def _cancel_sent(self, run: _Run, sending: asyncio.Task[list[AsyncHandle]]) -> None:
        """The same for requests whose reader went away while they were sent."""
        with suppress(L4QueueError):
            handles = await sending
            if not self._outlives_its_reader(run):
                await self._cancel(handles)

    async def _cancel(self, handles: Sequence[AsyncHandle]) -> None:
        for handle in handles:
            with suppress(L4QueueError):
                await handle.cancel(reason=_WENT_AWAY)

    def _errand(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def settled(self) -> None:
        """Wait until cancels are on their way."""
        await asyncio.gather(*self._errands, return_exceptions=True)

    async def abort(self, request_id: Any) -> None:
        """Nothing: a reader that goes away ends its generator, which cancels."""

    def shutdown(self, timeout: float | None = None) -> None:
        """From now on requests outlive their readers: another gateway goes on with them."""
        self._is_stopping = True

    async def is_tracing_enabled(self) -> bool:
        return True  # `traceparent` is ours to take

    async def do_log_stats(self) -> None:
        """Nothing: workers count."""

    async def is_paused(self) -> bool:
        return False

    async def is_sleeping(self) -> bool:
        return False


def _told(refusal: HttpRefusal) -> Any:
    """The refusal as an error that vLLM's server words rightly, also in the middle of a stream."""
    if refusal.status is HTTPStatus.BAD_REQUEST:
        return VLLMValidationError(refusal.message, parameter=refusal.field)
    return GracefulHTTPError(refusal.message, refusal.status)


def _not_offered(name: str) -> Callable[..., Any]:
    async def refuse(self: QueueEngine, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is for servers with an engine of their own")

    return refuse


# What remains of the interface is about an engine in the same process.
for _name in EngineClient.__abstractmethods__ & QueueEngine.__abstractmethods__:
    setattr(QueueEngine, _name, _not_offered(_name))
QueueEngine.__abstractmethods__ = frozenset()

"""vLLM's own check of structured outputs, off the event loop and with a time limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from workers.engine.base import EngineRequest
from workers.engine.vllm.translate import prompt, sampling_params

__all__ = ("ConstraintExaminer",)

_MAX_THREADS = 2  # one slow constraint does not hold up the next


class ConstraintExaminer:
    """Makes vLLM's request of ours in a thread: vLLM parses a constraint where it is called, and may take seconds.

    Its compilers let other threads run meanwhile. One that exceeds `limit_s` cannot be stopped: the request fails,
    and its thread ends on its own. Dispatchers refuse such a constraint before, unless they are older.
    """

    def __init__(self, *, limit_s: float) -> None:
        self._limit_s = limit_s
        self._free = asyncio.Semaphore(_MAX_THREADS)

    async def examine(self, llm: Any, request: EngineRequest) -> Any:
        """The request in vLLM's terms. Raises what vLLM does, and ValueError at the limit."""
        tasks = await llm.get_supported_tasks()

        def build() -> Any:
            return llm.input_processor.process_inputs(
                request.request_id, prompt(request), sampling_params(request), tasks, priority=request.priority
            )

        await self._free.acquire()
        working = _in_thread(build)
        working.add_done_callback(lambda _: self._free.release())
        done, _ = await asyncio.wait({working}, timeout=self._limit_s)
        if not done:
            raise ValueError(f"vLLM takes longer than {self._limit_s:g} s to accept it: use a smaller one")
        return working.result()


def _in_thread(function: Callable[[], Any]) -> asyncio.Future[Any]:
    """Its result, from a thread that does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)
        result.exception()  # it may have been given up

    def run() -> None:
        try:
            settled: tuple[Any, BaseException | None] = (function(), None)
        except Exception as error:  # to the loop, whatever it is
            settled = (None, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *settled)

    threading.Thread(target=run, name="constraint", daemon=True).start()
    return result

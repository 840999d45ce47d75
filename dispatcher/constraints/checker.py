"""Checks of structured outputs with a time limit, before any engine sees them: vLLM's own, in a process apart."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from dispatcher.constraints.size import MAX_SIZE, constraint_size
from l4queue.sampling import StructuredOutputs

__all__ = ("TRUST_REMOTE_CODE", "ConstraintChecker", "ConstraintVerdict")

log = logging.getLogger("l4queue.dispatcher")
TRUST_REMOTE_CODE = "--trust-remote-code"  # lets the process run code of the tokenizer; vLLM's own name
_MAX_VERDICTS = 4096
"""Verdicts that are remembered by digest; the least recently used go first. Chosen: some 2 MB at 500 characters
each."""
_LATE_KEPT_S = 300.0
"""How long a verdict for want of time holds, s. Chosen: a busy machine may do better later, a retry storm may
not."""
_MAX_LINE_BYTES = 1 << 20
"""Longest line of the process's answers, bytes: far above an id and an error of 500 characters."""
_MAX_STARTS = 3  # times that the process may end while it checks one constraint
_END_S = 1.0
"""How long the process may take to end by itself before it is killed, s. Chosen: it has nothing to save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintVerdict:
    """Whether engines can use a constraint; `error` says why not, and what to do.

    One that came too late is true for a while only: the machine may have been busy.
    """

    error: str = ""
    until_s: float = math.inf


class _ProcessEnded(Exception):
    """The checking process is gone."""


class ConstraintChecker:
    """Checks each constraint once; the latest verdicts, good and bad, are remembered.

    vLLM's own functions run in children of a process apart, each killed after `limit_s`. That process starts with
    `prepare`, or with the first constraint, and takes seconds to load vLLM and the model's tokenizer. Where vLLM
    is not installed, the size of the constraint is bounded instead.
    """

    def __init__(
        self,
        *,
        tokenizer: str,
        limit_s: float,
        trust_remote_code: bool = False,
        command: Sequence[str] | None = None,
    ) -> None:
        self._arguments = (tokenizer, *((TRUST_REMOTE_CODE,) if trust_remote_code else ()))
        self._limit_s = limit_s
        if command is None and importlib.util.find_spec("vllm") is not None:
            command = (sys.executable, "-m", "dispatcher.constraints.process")
        self._command = tuple(command or ())
        self._verdicts: OrderedDict[str, ConstraintVerdict] = OrderedDict()
        self._checking: dict[str, asyncio.Task[ConstraintVerdict]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._answers: dict[str, asyncio.Future[ConstraintVerdict]] = {}

    def known(self, given: StructuredOutputs) -> ConstraintVerdict | None:
        """The verdict, if it was found before."""
        return self._remembered(_digest(given))

    def _remembered(self, digest: str) -> ConstraintVerdict | None:
        verdict = self._verdicts.get(digest)
        if verdict is None or verdict.until_s <= time.monotonic():
            return None
        self._verdicts.move_to_end(digest)
        return verdict

    async def prepare(self) -> None:
        """Let the process load, so that no request waits for that; again once it has ended."""
        if self._command:
            await self._running()

    async def check(self, given: StructuredOutputs) -> ConstraintVerdict:
        """The verdict. Questions about the same constraint share one check."""
        digest = _digest(given)
        verdict = self._remembered(digest)
        if verdict is not None:
            return verdict
        task = self._checking.get(digest)
        if task is None:
            task = self._checking[digest] = asyncio.create_task(self._check(digest, given))
            task.add_done_callback(lambda _: self._checking.pop(digest, None))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End the process."""
        for task in list(self._checking.values()):
            task.cancel()
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()  # it kills its children, unless it is still loading
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await process.wait()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _check(self, digest: str, given: StructuredOutputs) -> ConstraintVerdict:
        verdict = await self._ask(digest, given) if self._command else _by_size(given)
        self._verdicts[digest] = verdict
        self._verdicts.move_to_end(digest)
        while len(self._verdicts) > _MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        return verdict

    async def _ask(self, digest: str, given: StructuredOutputs) -> ConstraintVerdict:
        question = {
            "id": digest,
            "limit_s": self._limit_s,
            "given": given.model_dump(exclude_none=True),
            "is_large": constraint_size(given) > MAX_SIZE,
        }
        for _ in range(_MAX_STARTS):
            process = await self._running()
            answer: asyncio.Future[ConstraintVerdict] = asyncio.get_running_loop().create_future()
            self._answers[digest] = answer
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(question).encode() + b"\n")
                await process.stdin.drain()
                return await answer
            except (_ProcessEnded, ConnectionError, RuntimeError):
                continue
            finally:
                self._answers.pop(digest, None)
        log.error("the process that checks constraints cannot run; from now on only their size is checked")
        self._command = ()
        return _by_size(given)

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    *self._arguments,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=_MAX_LINE_BYTES,
                    env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR"},
                    start_new_session=True,  # Ctrl-C in a terminal is for the dispatcher, which ends it
                )
                self._reading = asyncio.create_task(self._read(self._process))
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                told = json.loads(line)
                answer = self._answers.get(told["id"])
                if answer is not None and not answer.done():
                    until_s = time.monotonic() + _LATE_KEPT_S if told["is_late"] else math.inf
                    answer.set_result(ConstraintVerdict(error=told["error"], until_s=until_s))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(_ProcessEnded())


def _digest(given: StructuredOutputs) -> str:
    return hashlib.blake2b(given.model_dump_json(exclude_none=True).encode(), digest_size=16).hexdigest()


def _by_size(given: StructuredOutputs) -> ConstraintVerdict:
    size = constraint_size(given)
    if size <= MAX_SIZE:
        return ConstraintVerdict()
    return ConstraintVerdict(
        error=f"is too large: {size} parts with all repetitions, at most {MAX_SIZE} are accepted; use fewer "
        "properties, choices and nested repetitions"
    )

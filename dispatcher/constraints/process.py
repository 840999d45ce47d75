"""The process that checks constraints: `python -m dispatcher.constraints.process TOKENIZER [--trust-remote-code]`.

It reads a question a line, `{"id", "limit_s", "given", "is_large"}`, and writes an answer a line, `{"id", "error",
"is_late"}`. An empty error means that vLLM accepts the constraint. A large one leaves a child free for others.

Each check runs in its own child, forked after vLLM is loaded, and is killed at its limit. Compilation is native
code that nothing else stops. The process ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from dispatcher.constraints.checker import TRUST_REMOTE_CODE
from l4queue.pretrained import tokenizer_place

__all__ = ("Check", "Checks", "load_check", "serve")

Check = Callable[[dict[str, Any]], str]
"""The error of a constraint, or nothing."""

_MAX_CHILDREN, _MAX_LARGE = 2, 1
"""Children that compile at once, and large constraints among them. Chosen: one large constraint never holds up
all."""
_MAX_MEMORY_BYTES = 4 << 30  # address space of a child beyond what it begins with
_MAX_ERROR_CHARS = 500
"""Characters of an error that are passed on: compilers quote whole grammars."""
_ADVICE = "use a smaller one: fewer properties and choices, no nested or long repetitions"


@dataclass(frozen=True, slots=True)
class _Child:
    id: str
    process_id: int
    limit_s: float
    deadline_s: float
    is_large: bool


class Checks:
    """Children and the questions that wait for one."""

    def __init__(self, check: Check, *, answer: Callable[[str, str, bool], None]) -> None:
        self._check = check
        self._answer = answer
        self._waiting: dict[bool, deque[dict[str, Any]]] = {False: deque(), True: deque()}  # large ones apart
        self._children: dict[int, _Child] = {}
        self.selector = selectors.DefaultSelector()

    def ask(self, question: dict[str, Any]) -> None:
        """Check this as soon as there is a child free."""
        self._waiting[bool(question.get("is_large"))].append(question)
        self._fill()

    def next_deadline_s(self) -> float | None:
        """Seconds until the first child is late; None without one."""
        if not self._children:
            return None
        return max(0.0, min(child.deadline_s for child in self._children.values()) - time.monotonic())

    def finished(self, pipe: int) -> None:
        """A child has answered, or has ended without."""
        child = self._children.pop(pipe)
        answer = b""
        while piece := os.read(pipe, 65_536):
            answer += piece
        _, status = os.waitpid(child.process_id, 0)
        self._close(pipe)
        if answer.startswith(b"="):
            self._answer(child.id, answer[1:].decode(errors="replace"), False)
        else:
            self._answer(child.id, f"ends the process that compiles it ({_ending(status)}): {_ADVICE}", False)
        self._fill()

    def kill_late(self) -> None:
        """End the children whose time is over."""
        now_s = time.monotonic()
        for pipe, child in list(self._children.items()):
            if child.deadline_s <= now_s:
                del self._children[pipe]
                self._end(pipe, child)
                self._answer(child.id, f"takes longer than {child.limit_s:g} s to compile: {_ADVICE}", True)
        self._fill()

    def stop(self) -> None:
        """End all."""
        for pipe, child in self._children.items():
            self._end(pipe, child)
        self._children.clear()

    def _next(self) -> dict[str, Any] | None:
        """The question that a child may begin with now."""
        num_large = sum(child.is_large for child in self._children.values())
        for is_large, waiting in self._waiting.items():
            if waiting and len(self._children) < _MAX_CHILDREN and not (is_large and num_large >= _MAX_LARGE):
                return waiting.popleft()
        return None

    def _fill(self) -> None:
        while (question := self._next()) is not None:
            reading, writing = os.pipe()
            process_id = os.fork()
            if process_id == 0:
                self._run(question, writing)
            os.close(writing)
            limit_s = float(question["limit_s"])
            is_large = bool(question.get("is_large"))
            child = _Child(question["id"], process_id, limit_s, time.monotonic() + limit_s, is_large)
            self._children[reading] = child
            self.selector.register(reading, selectors.EVENT_READ, self.finished)

    def _run(self, question: dict[str, Any], writing: int) -> None:
        """The work of the child. Does not return."""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # compilers print what a request made them do
            _bound_resources(float(question["limit_s"]))
            error = self._check(question["given"])[:_MAX_ERROR_CHARS]
            os.write(writing, b"=" + error.encode(errors="replace"))
        except MemoryError:
            os.write(writing, f"=takes too much memory to compile: {_ADVICE}".encode())
        except Exception as error:  # of a library; the process goes on with the next one
            os.write(writing, f"=cannot be checked: {error!r}"[:_MAX_ERROR_CHARS].encode(errors="replace"))
        finally:
            os._exit(1)

    def _end(self, pipe: int, child: _Child) -> None:
        os.kill(child.process_id, signal.SIGKILL)
        os.waitpid(child.process_id, 0)
        self._close(pipe)

    def _close(self, pipe: int) -> None:
        self.selector.unregister(pipe)
        os.close(pipe)


def serve(check: Check, questions: int, answers: IO[bytes]) -> None:
    """Answer until the input ends."""

    def answer(id_: str, error: str, is_late: bool) -> None:
        answers.write(json.dumps({"id": id_, "error": error, "is_late": is_late}).encode() + b"\n")
        answers.flush()

    checks = Checks(check, answer=answer)
    checks.selector.register(questions, selectors.EVENT_READ)
    unread = b""
    try:
        while True:
            for key, _ in checks.selector.select(checks.next_deadline_s()):
                if key.data is not None:
                    key.data(key.fd)
                    continue
                piece = os.read(questions, 65_536)
                if not piece:
                    return
                *lines, unread = (unread + piece).split(b"\n")
                for line in lines:
                    checks.ask(json.loads(line))
            checks.kill_late()
    finally:
        checks.stop()


def load_check(tokenizer_path: str, *, trust_remote_code: bool = False) -> Check:
    """vLLM's validation and compilation of a constraint, with the model's tokenizer.

    An engine core keeps the first backend that it needed for all later constraints. So each is compiled by the one
    that vLLM chooses, which has to accept it, and by the usual ones, which have to end in time.
    """
    from types import SimpleNamespace

    import xgrammar  # noqa: F401 - vLLM imports it at first use, which would be in every child
    from vllm.config import StructuredOutputsConfig
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.tokenizers import get_tokenizer
    from vllm.v1.structured_output.backend_guidance import GuidanceBackend
    from vllm.v1.structured_output.backend_outlines import OutlinesBackend
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
    from vllm.v1.structured_output.request import get_structured_output_key

    tokenizer = get_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    config = StructuredOutputsConfig()
    model = SimpleNamespace(is_diffusion=False, hf_config=SimpleNamespace(model_type=""))
    engine = SimpleNamespace(structured_outputs_config=config, model_config=model, speculative_config=None)
    vocabulary_size = max(tokenizer.get_vocab().values()) + 1
    kinds = {"xgrammar": XgrammarBackend, "guidance": GuidanceBackend}
    usual = {name: make(engine, tokenizer=tokenizer, vocab_size=vocabulary_size) for name, make in kinds.items()}

    def check(given: dict[str, Any]) -> str:
        try:
            params = SamplingParams(structured_outputs=StructuredOutputsParams(**given))
            params._validate_structured_outputs(model, config, tokenizer)
            constraint = params.structured_outputs
            key = get_structured_output_key(constraint)
            chosen = usual.get(constraint._backend) or OutlinesBackend(
                engine, tokenizer=tokenizer, vocab_size=vocabulary_size
            )
            _begin(chosen, key)
        except MemoryError:
            raise
        except Exception as error:  # it refuses with many types
            return f"vLLM does not accept it: {error or repr(error)}"
        for other in usual.values():
            if other is not chosen:
                with contextlib.suppress(Exception):  # only that it ends is asked
                    _begin(other, key)
        return ""

    return check


def _begin(backend: Any, key: Any) -> None:
    """Compile a constraint and find what its first token may be: some compilers leave their work to that."""
    backend.compile_grammar(*key).fill_bitmask(backend.allocate_token_bitmask(1), 0)


def _bound_resources(limit_s: float) -> None:
    """At the limit of memory, allocations fail in this process alone; that of CPU time ends an orphan."""
    cpu_s = math.ceil(2 * limit_s * (os.cpu_count() or 1))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + _MAX_MEMORY_BYTES,) * 2)


def _ending(status: int) -> str:
    number = os.waitstatus_to_exitcode(status)
    return signal.Signals(-number).name if number < 0 else f"exit code {number}"


def main() -> int:
    """Entry point. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    place, *flags = sys.argv[1:]
    serve(load_check(str(tokenizer_place(place)), trust_remote_code=TRUST_REMOTE_CODE in flags), 0, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

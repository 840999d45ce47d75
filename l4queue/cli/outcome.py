"""Ends of a command for programs: its exit code by the outcome, and its error as one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

from l4queue import errors
from l4queue.errors import L4QueueError

__all__ = ("MEANINGS", "ExitCode", "about", "exit_code", "show_error")


class ExitCode(IntEnum):
    """How a command ended; `MEANINGS` says it in words."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    WITH_ERRORS = 3
    FAILED = 4
    CANCELLED = 5
    EXPIRED = 6
    NOT_FOUND = 7
    UNAVAILABLE = 8
    TIMEOUT = 9
    FULL = 10
    INTERRUPTED = 130
    TERMINATED = 143


MEANINGS: dict[ExitCode, str] = {
    ExitCode.DONE: "done",
    ExitCode.ERROR: "another error: a wrong setting, a bad file, a full disk, a failed `doctor` or `health`",
    ExitCode.USAGE: "wrong usage: an unknown option, a missing argument",
    ExitCode.WITH_ERRORS: "the batch is finished, and some of its lines are in the error file",
    ExitCode.FAILED: "the request was refused, or cannot be computed, or is dead",
    ExitCode.CANCELLED: "the request was cancelled",
    ExitCode.EXPIRED: "the deadline of the request passed",
    ExitCode.NOT_FOUND: "no such request, or its output is no longer there",
    ExitCode.UNAVAILABLE: "Redis is away or refuses, or a process of the deployment cannot start",
    ExitCode.TIMEOUT: "`--timeout` is over; the request goes on",
    ExitCode.FULL: "the backlog is full; try again later",
    ExitCode.INTERRUPTED: "Ctrl-C",
    ExitCode.TERMINATED: "SIGTERM",
}

_CODES: tuple[tuple[type[L4QueueError], ExitCode], ...] = (
    (errors.RequestCancelled, ExitCode.CANCELLED),
    (errors.RequestExpired, ExitCode.EXPIRED),
    (errors.RequestNotDone, ExitCode.FAILED),
    (errors.InvalidRequest, ExitCode.FAILED),
    (errors.IdempotencyConflict, ExitCode.FAILED),
    (errors.UnknownRequest, ExitCode.NOT_FOUND),
    (errors.OutputLost, ExitCode.NOT_FOUND),
    (errors.ResultTimeout, ExitCode.TIMEOUT),
    (errors.QueueFull, ExitCode.FULL),
    (errors.ServiceUnavailable, ExitCode.UNAVAILABLE),
)


_FILES = frozenset({"jsonl", "out", "errors"})
"""Fields of `run_batch` that name files: no request is at fault."""


def exit_code(error: L4QueueError) -> ExitCode:
    """The code of this error; that of a subclass before that of its base."""
    if isinstance(error, errors.InvalidRequest) and error.field in _FILES:
        return ExitCode.ERROR
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.ERROR)


@contextmanager
def about(request_id: str) -> Iterator[None]:
    """Let errors in here carry the request that they are about."""
    try:
        yield
    except L4QueueError as error:
        if getattr(error, "request_id", None) is None:
            error.__dict__["request_id"] = request_id
        raise


def show_error(
    error: BaseException,
    *,
    as_json: bool,
    kind: str | None = None,
    message: str | None = None,
    known: Sequence[str] = (),
) -> None:
    """One line on standard error, or `{"error": ...}` on standard output for programs.

    The line names the request, unless it does so anyway or the user has: `known` are the words of the command.
    """
    text = str(error) if message is None else message
    request_id = getattr(error, "request_id", None)
    if not as_json:
        is_named = request_id is None or request_id in known or request_id in text
        print(f"error: {text}{'' if is_named else f' (request {request_id})'}", file=sys.stderr)
        return
    told = {"type": kind or type(error).__name__, "message": text, "request_id": request_id}
    told["field"] = getattr(error, "field", None)
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        told["retry_after_s"] = retry_after_s
    print(json.dumps({"error": told}), flush=True)

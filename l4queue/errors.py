"""Every error a user of l4queue can meet, in one tree.

L4QueueError
├── ConfigError            a setting is missing or wrong
├── InvalidRequest         refused before it was sent; `field` names what is wrong
├── QueueFull              the bounded backlog is full; `retry_after_s` says when to try again
├── IdempotencyConflict    the same idempotency key with a different body
├── UnknownRequest         no record of this id (never accepted, or its result has expired)
│   └── ResultExpired      how it ended is known, and its output is no longer there
├── ResultTimeout          the wait ended before the request did; it goes on
├── OutputLost             the request is known, but not all of its output is there any more
├── RequestNotDone         a terminal outcome other than `done`
│   ├── RequestFailed      refused by the dispatcher or not computable; `field` for bad input
│   │   └── RequestTooLong prompt + max_tokens exceed the model's limit
│   ├── RequestCancelled
│   ├── RequestExpired     its deadline passed
│   └── RequestDead        it killed the engine each time it ran alone
├── ServiceUnavailable     Redis cannot be reached or answers with an error
├── TraceError             a trace file is broken; names file, line and column
└── UnreadableValue        what another process wrote cannot be read; says what and why
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = (
    "ConfigError",
    "IdempotencyConflict",
    "InvalidRequest",
    "L4QueueError",
    "OutputLost",
    "PortableError",
    "QueueFull",
    "RequestCancelled",
    "RequestDead",
    "RequestExpired",
    "RequestFailed",
    "RequestNotDone",
    "RequestTooLong",
    "ResultExpired",
    "ResultTimeout",
    "ServiceUnavailable",
    "TraceError",
    "UnknownRequest",
    "UnreadableValue",
)


class PortableError(Exception):
    """An exception that is the same after pickling and copying: kind, text, attributes and notes.

    An exception is otherwise built again by `kind(*args)`. Where `__init__` wants more than that, or words its
    message itself, this fails in the process that reads it: a pool then waits for its result for ever.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args, self.__dict__)


class L4QueueError(PortableError):
    """Root of all errors raised by l4queue.

    `args` are what `__init__` takes, message first, and are plain values: `type(error)(*error.args)` is the same
    error. So Celery, which stores an error in JSON as its class and `args`, gives callers this very class.

    Whatever ends `enqueue` or `enqueue_many` says what became of the requests, also errors of other kinds and
    cancellation (the cause of a TimeoutError). `accepted` has the handles of the accepted ones, in order;
    `in_doubt` those of requests that were sent and not answered, whose `status()` tells; `refused` the positions
    of the refused ones. The others were not sent.
    """

    accepted: tuple[Any, ...] = ()
    in_doubt: tuple[Any, ...] = ()
    refused: tuple[int, ...] = ()

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigError(L4QueueError):
    """A setting is missing or wrong; the message says which and what to do."""


class InvalidRequest(L4QueueError, ValueError):
    """The request can never run. `field` names the offending field."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message, field)
        self.field = field

    def __str__(self) -> str:
        return f"{self.field}: {self.args[0]}"


class QueueFull(L4QueueError):
    """The backlog is at its bound; try again after `retry_after_s`.

    Of many requests some may fit: their handles are in `accepted`, and `refused` has the positions of the others.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.args[0]}; retry after {self.retry_after_s:.1f} s"


class IdempotencyConflict(L4QueueError):
    """The idempotency key was used before with a different request."""


class UnknownRequest(L4QueueError, KeyError):
    """No record of this id: never accepted, or its result TTL has passed."""


class ResultExpired(UnknownRequest):
    """The request has ended and its idempotency key is known, but its output has expired or went early for want of
    room: `status()` says how it ended."""


class ResultTimeout(L4QueueError, TimeoutError):
    """The wait ended before the request did. The request goes on; wait again or cancel it."""


class OutputLost(L4QueueError):
    """The record and the output of a request differ: output was deleted, or a server lost writes at a failover."""


class RequestNotDone(L4QueueError):
    """The request ended in a terminal state other than `done`."""

    def __init__(self, message: str, request_id: str, field: str | None = None) -> None:
        super().__init__(message, request_id, field)
        self.request_id = request_id
        self.field = field


class RequestFailed(RequestNotDone):
    """The request was refused or could not be computed; `field` is set when input was at fault."""


class RequestTooLong(RequestFailed):
    """Prompt and `max_tokens` together exceed what the model can hold."""


class RequestCancelled(RequestNotDone):
    """The request was cancelled."""


class RequestExpired(RequestNotDone):
    """The deadline passed before the request finished."""


class RequestDead(RequestNotDone):
    """The request crashed its worker repeatedly, the last times while running alone."""


class ServiceUnavailable(L4QueueError):
    """Redis cannot be reached, or refuses commands; the message says which and what to do."""


class TraceError(L4QueueError, ValueError):
    """A trace file is broken; the message is one line naming file, line and column."""


class UnreadableValue(L4QueueError, ValueError):
    """A value that another process wrote cannot be read: broken, or of a format unknown to this release."""


def _rebuilt(kind: type[PortableError], args: tuple[Any, ...], state: Mapping[str, Any]) -> PortableError:
    """The exception as it was, without a second call of its `__init__`."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error

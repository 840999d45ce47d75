"""Options of a batch: files, priority, limits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from l4queue.client.arguments import unknown_parameter
from l4queue.client.batch.files import new_beside
from l4queue.client.batch.halves import checked_gateway
from l4queue.errors import InvalidRequest

__all__ = (
    "DEFAULT_MAX_IN_FLIGHT",
    "DEFAULT_PRIORITY",
    "BatchOptions",
    "BatchRunOptions",
    "LineOptions",
    "batch_options",
)

DEFAULT_PRIORITY = 100
"""The last class: a request of priority 0 that arrives up to half of `L4_STARVATION_BOUND_S` (5 minutes) later is
served first, and the engine, too, takes a batch last. After that it has waited for long enough."""
DEFAULT_MAX_IN_FLIGHT = 4096  # requests; enough to fill a fleet, few to cancel


class BatchRunOptions(TypedDict, total=False):
    """Options of `run_batch`, typed for editors: see `BatchOptions`."""

    priority: int
    max_tokens: int | None
    max_in_flight: int
    cancel_on_exit: bool
    keep_results: bool
    any_model: bool
    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LineOptions:
    """Options of a batch wherever its lines are.

    `max_tokens` (None: what still fits) and `priority` are for lines that do not say; `max_in_flight` bounds the
    window of requests in flight. `any_model` lets lines name a model that is not served. InvalidRequest names an
    option that cannot be used.
    """

    priority: int = DEFAULT_PRIORITY
    max_tokens: int | None = None
    max_in_flight: int = DEFAULT_MAX_IN_FLIGHT
    cancel_on_exit: bool = False
    keep_results: bool = False
    any_model: bool = False

    def __post_init__(self) -> None:
        _check_whole("max_in_flight", self.max_in_flight, least=1, most=1_000_000)
        _check_whole("priority", self.priority, least=-100, most=100)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, least=1, most=1_000_000)
        _check_truth("cancel_on_exit", self.cancel_on_exit)
        _check_truth("keep_results", self.keep_results)
        _check_truth("any_model", self.any_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions(LineOptions):
    """The same with files. `path_errors` None is the output's name with `.errors.jsonl` added.

    `gateway` is the address of an `l4queue serve`: its server writes all requests and makes their answers, as
    over HTTP.
    """

    path_in: Path
    path_out: Path
    path_errors: Path | None = None
    gateway: str = ""

    def __post_init__(self) -> None:
        LineOptions.__post_init__(self)  # a class with slots is made twice: super() would mean the first
        if self.gateway:
            checked_gateway(self.gateway)
        if not self.path_out.name:
            raise InvalidRequest(f"{str(self.path_out)!r} is not the name of a file", field="out")
        files = (self.path_in, self.path_out, self.errors, self.identity, new_beside(self.identity))
        try:
            are_one = len({path.resolve() for path in files}) < len(files) or any(
                one.samefile(other) for one, other in combinations((f for f in files if f.exists()), 2)
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidRequest(f"is not a path that can be used: {error}", field="out") from None
        if are_one:
            raise InvalidRequest(
                f"input, output, errors and {self.identity.name} must be different files", field="out"
            )

    @property
    def errors(self) -> Path:
        """The error file."""
        return self.path_errors or self.path_out.with_name(self.path_out.name + ".errors.jsonl")

    @property
    def identity(self) -> Path:
        """Where the identity of the unfinished batch is kept."""
        return self.path_out.with_name(self.path_out.name + ".batch.json")


def batch_options(
    path_in: str | PathLike[str],
    path_out: str | PathLike[str],
    path_errors: str | PathLike[str] | None = None,
    **options: Any,
) -> BatchOptions:
    """Options from what a caller wrote; InvalidRequest names an unknown one."""
    known = [field.name for field in fields(BatchOptions) if not field.name.startswith("path_")]
    for name in options:
        if name not in known:
            raise unknown_parameter(name, known=known)
    try:
        errors = None if path_errors is None else Path(path_errors)
        paths: dict[str, Any] = {"path_in": Path(path_in), "path_out": Path(path_out), "path_errors": errors}
    except TypeError as error:
        raise InvalidRequest(f"is not a path: {error}", field="out") from None
    return BatchOptions(**paths, **options)


def _check_whole(name: str, value: object, *, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(f"must be a whole number in [{least}, {most}]", field=name)


def _check_truth(name: str, value: object) -> None:
    if type(value) is not bool:
        raise InvalidRequest("must be True or False", field=name)

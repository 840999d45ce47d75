"""What a batch is to do: files, priority, limits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from l4queue.errors import InvalidRequest

__all__ = ("DEFAULT_MAX_IN_FLIGHT", "DEFAULT_PRIORITY", "BatchOptions", "batch_options")

DEFAULT_PRIORITY = 100
"""The last class: a request of priority 0 that arrives up to half of `L4_STARVATION_BOUND_S` (5 minutes) later is
served first, and the engine, too, takes a batch last. After that it has waited for long enough."""
DEFAULT_MAX_IN_FLIGHT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What to run and how. `path_errors` None is the output's name with `.errors.jsonl` added.

    `max_tokens` (None: what still fits) and `priority` are for lines that do not say; `max_in_flight` bounds the
    window of requests in flight. InvalidRequest names an option that cannot be used.
    """

    path_in: Path
    path_out: Path
    path_errors: Path | None = None
    priority: int = DEFAULT_PRIORITY
    max_tokens: int | None = None
    max_in_flight: int = DEFAULT_MAX_IN_FLIGHT
    cancel_on_exit: bool = False
    keep_results: bool = False

    def __post_init__(self) -> None:
        if self.max_in_flight < 1:
            raise InvalidRequest("must be at least 1", field="max_in_flight")
        if not -100 <= self.priority <= 100:
            raise InvalidRequest("must lie in [-100, 100]", field="priority")
        if self.max_tokens is not None and not 1 <= self.max_tokens <= 1_000_000:
            raise InvalidRequest("must lie in [1, 1000000]", field="max_tokens")
        if len({path.resolve() for path in (self.path_in, self.path_out, self.errors)}) < 3:
            raise InvalidRequest("input, output and errors must be three files", field="out")

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
    known = {field.name for field in fields(BatchOptions)}
    for name in options:
        if name not in known or name.startswith("path_"):
            raise InvalidRequest("unknown parameter", field=name)
    errors = None if path_errors is None else Path(path_errors)
    return BatchOptions(path_in=Path(path_in), path_out=Path(path_out), path_errors=errors, **options)

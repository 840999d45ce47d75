"""Places of a batch: its lines, answers and identity, as files beside each other or in a gateway's store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from l4queue.client.batch.files import BatchIdentity, InputFile
from l4queue.errors import InvalidRequest

__all__ = ("Answers", "BatchEnding", "BatchPlaces", "Identity")


class Answers(Protocol):
    """Answers of a batch, appended by one run at a time; those of earlier runs can be read.

    `append` takes one line with its end. After `flush` others may read it; after `sync` no crash loses it.
    InvalidRequest where it cannot be written, ServiceUnavailable where that may pass.
    """

    @property
    def is_empty(self) -> bool: ...

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]: ...

    def unusable(self, number: int, why: str) -> InvalidRequest: ...

    def append(self, line: bytes) -> None: ...

    def flush(self) -> None: ...

    def sync(self) -> None: ...


class Identity(Protocol):
    """The identity of a batch, kept from its first request to its last answer."""

    @property
    def goes_on(self) -> bool: ...

    def read(self) -> BatchIdentity: ...

    def write(self, identity: BatchIdentity) -> None: ...

    def remove(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEnding:
    """Why a batch ends before its time: its open lines become errors with this code and message."""

    code: str
    message: str


def _no_ending() -> None:
    return None


def _half_a_second(_: float) -> float:
    return 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlaces:
    """Lines, answers, errors and identity of one batch, and their names in the summary.

    `commit_every_s` says how often answers are made durable, by the age of the run, s. `ending` is asked now and
    then: an BatchEnding stops the batch for good, requests in flight are cancelled.
    """

    lines: InputFile
    out: Answers
    errors: Answers
    identity: Identity
    name_out: str
    name_errors: str
    commit_every_s: Callable[[float], float] = _half_a_second  # an fsync takes milliseconds
    ending: Callable[[], BatchEnding | None] = _no_ending

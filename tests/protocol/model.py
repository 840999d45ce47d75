"""What the machine remembers of requests, leases and grants."""

from __future__ import annotations

from dataclasses import dataclass, field

from l4queue.models import RequestState

__all__ = ("Held", "Lease", "Req")


@dataclass(slots=True)
class Req:
    """What the record of a request should say."""

    charge: int
    digest: str
    state: RequestState = RequestState.SUBMITTED
    stage: str = ""
    score: float = 0.0
    epoch: int = 0
    offset: int = 0
    crashes: int = 0
    solo_crashes: int = 0
    owner: str | None = None
    settled_epoch: int | None = None


@dataclass(slots=True)
class Lease:
    """What a registered worker should have."""

    is_lapsed: bool = False
    graces: int = 0
    alone: str | None = None
    nonce: str = ""
    granted: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class Held:
    """A grant as its worker remembers it, for ever, whatever became of it."""

    request_id: str
    worker: str
    epoch: int
    offset: int

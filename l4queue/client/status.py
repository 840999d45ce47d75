"""Status of a request as its user sees it: names and seconds."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.records import RequestRecord

__all__ = ("RequestStatus",)

_MOMENTS = ("submitted", "queued", "started", "first_token", "finished", "deadline", "dropped")
_OLD_NAMES = {
    "offset": "output_tokens",
    "epoch": "num_leases",
    "body": "request",
    **{f"{moment}_ms": f"{moment}_at_s" for moment in _MOMENTS},
    **{f"{length}_ms": f"{length}_s" for length in ("ttft", "tpot", "e2e")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """Where a request is. Moments end in `_at_s`: Unix time by the server's clock, s; None: not yet.

    `stage` is the queue it is in, a number from 0 on or `solo`; `num_leases` says how often a worker took it.
    `cached_tokens` of the prompt were in the engine's prefix cache; None: not known (yet).
    `ttft_s`, `tpot_s` and `e2e_s` are durations as in `Result`. `error` and `field` tell what was wrong.
    """

    request_id: str
    state: RequestState
    stage: str | None = None
    worker: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    max_tokens: int | None = None
    output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    field: str | None = None
    crashes: int = 0
    num_leases: int = 0
    plan: int | None = None
    submitted_at_s: float
    queued_at_s: float | None = None
    started_at_s: float | None = None
    first_token_at_s: float | None = None
    finished_at_s: float | None = None
    deadline_at_s: float | None = None
    dropped_at_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    request: dict[str, Any]
    """What was accepted beside the prompt: `params`, `priority`, `metadata`, `traceparent`."""

    @classmethod
    def of(cls, record: RequestRecord) -> RequestStatus:
        """The status that a record tells."""
        return cls(
            request_id=record.request_id,
            state=record.state,
            stage=record.stage,
            worker=record.worker,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            max_tokens=record.max_tokens,
            output_tokens=record.offset,
            finish_reason=record.finish_reason,
            error=record.error,
            field=record.field,
            crashes=record.crashes,
            num_leases=record.epoch,
            plan=record.plan,
            submitted_at_s=record.submitted_ms / 1000,
            queued_at_s=_seconds(record.queued_ms),
            started_at_s=_seconds(record.started_ms),
            first_token_at_s=_seconds(record.first_token_ms),
            finished_at_s=_seconds(record.finished_ms),
            deadline_at_s=_seconds(record.deadline_ms),
            dropped_at_s=_seconds(record.dropped_ms),
            ttft_s=_seconds(record.ttft_ms),
            tpot_s=_seconds(record.tpot_ms),
            e2e_s=_seconds(record.e2e_ms),
            request=record.body_fields,
        )

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, in whatever way: it changes no more."""
        return self.state in TERMINAL

    @property
    def was_resumed(self) -> bool:
        """Whether more than one lease computed it: after a crash, a hand-over or a give-back."""
        return self.num_leases > 1

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A name of the release before: `offset`, `epoch`, `body`, times in ms. It goes with the next one."""
            if name not in _OLD_NAMES:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            new = _OLD_NAMES[name]
            warnings.warn(f"RequestStatus.{name} is now {new}", DeprecationWarning, stacklevel=2)
            value = getattr(self, new)
            if name == "body":
                return json.dumps(value, separators=(",", ":"))
            if not name.endswith("_ms") or value is None:
                return value
            return value * 1000 if name == "tpot_ms" else round(value * 1000)


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000

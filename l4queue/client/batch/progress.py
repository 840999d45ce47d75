"""Reports of a batch: progress during the run, a summary at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ("BatchProgress", "BatchSummary", "ThrottledProgress")

_EVERY_S = 0.1  # fast enough for the eye


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProgress:
    """Where a batch is. `num_finished` includes failed lines and those of earlier runs.

    While the files are `checking`, `num_finished` counts lines read and `num_lines` is not known (0).
    `lines_per_s` is the rate of the last half minute, `left_s` the time that the rest takes at it: None while
    nothing moves. `notice` says why it does not go on: a full backlog, Redis out of reach. In a gateway
    `limited_by` names the limit of its key that it waits for.
    """

    phase: str
    num_lines: int
    num_finished: int
    num_failed: int = 0
    num_in_flight: int = 0
    lines_per_s: float = 0.0
    left_s: float | None = None
    notice: str = ""
    limited_by: str = ""


@dataclass(slots=True)
class ThrottledProgress:
    """Calls `show` ten times a second at most."""

    show: Callable[[BatchProgress], None]
    shown_s: float = field(default=0.0)

    def is_due(self) -> bool:
        """Whether it is time to show the progress again."""
        return time.monotonic() - self.shown_s > _EVERY_S

    def tell(self, progress: BatchProgress, *, now: bool = False) -> None:
        """Show it, if it is time or has to be now."""
        if now or self.is_due():
            self.shown_s = time.monotonic()
            self.show(progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSummary:
    """The outcome of a batch. Counts of lines are those of the files; tokens and time those of this run.

    `num_earlier` lines were finished before this run, `num_found` were in flight from an earlier run and were
    collected without being computed again, `num_recomputed` had been accepted before, but their results were
    no longer known (TTL passed, or Redis lost them), so they were enqueued again. Not `is_complete`: stopped
    before every line was finished; the same call continues.

    Latencies are those of the requests that this run collected as done, from acceptance on, waiting included:
    `e2e_...` to the stored outcome, `ttft_...` to the first token. They are None where there is none.
    """

    num_lines: int
    num_succeeded: int
    num_failed: int
    num_earlier: int
    num_found: int
    num_recomputed: int
    num_in_flight: int
    prompt_tokens: int
    output_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    e2e_p50_s: float | None
    e2e_p99_s: float | None
    wall_s: float
    lines_per_s: float
    is_complete: bool
    path_out: str
    path_errors: str

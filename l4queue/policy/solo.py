"""The worker that runs empty, so that a request that is to run alone gets its turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4queue.models import WorkerLoad

__all__ = ("SoloLimits", "Turn", "turn_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class SoloLimits:
    """How long the first request of the solo queue may wait for a worker that has nothing else.

    Together: at most `patience_s + empty_s` and a look at the queue, and `step_s` more for each worker whose turn
    it was and that did not come to it.
    """

    #: for a worker to become idle by itself. A fleet that is not full has one within seconds.
    patience_s: float = 5.0
    #: that a worker waits for what it runs to end or to move on; then it gives the rest back. Most outputs end
    #: sooner; each that does not costs one prefill elsewhere.
    empty_s: float = 10.0
    #: after which the next worker runs empty, too: the one before it has had its time and `step_s - empty_s` more
    step_s: float = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Whether to run empty, and why, or why not."""

    is_ours: bool
    reason: str


def turn_of(
    own: WorkerLoad, others: Sequence[WorkerLoad], *, waited_s: float, limits: SoloLimits | None = None
) -> Turn:
    """Whether `own` runs empty for a request that has waited so long at the head of the solo queue.

    One worker does: who does it already stays with it, else the one with least to do; ties by context, then name.
    The next in this order joins when that one has had its time: it may hang, or be cut off. Workers that drain, or
    of a release that does not tell (`can_empty`), have no turn.
    """
    limits = limits or SoloLimits()
    if own.is_draining:
        return Turn(is_ours=False, reason="draining")
    rivals = [w for w in others if w.can_empty and not w.is_draining and w.worker_id != own.worker_id]
    rank = sum(_order(rival) < _order(own) for rival in rivals)
    if own.is_emptying and rank == 0:
        return Turn(is_ours=True, reason="has begun")
    if waited_s < limits.patience_s:
        return Turn(is_ours=False, reason="perhaps a worker becomes idle")
    if waited_s < limits.patience_s + rank * limits.step_s:
        return Turn(is_ours=False, reason=f"{rank} before it")
    return Turn(is_ours=True, reason="least to do" if rank == 0 else "those before it did not come to it")


def _order(load: WorkerLoad) -> tuple[bool, int, int, str]:
    busy = load.num_running
    return (not load.is_emptying, busy, load.context_tokens, load.worker_id)

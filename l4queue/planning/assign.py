"""Assignment of workers to stages for a new plan, with the fewest moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

from l4queue.models import Plan, StagePlan, WorkerLoad

__all__ = ("Assignment", "assign", "scale_counts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Stages with their workers (sorted by id) and the workers whose range changes for another."""

    stages: tuple[StagePlan, ...]
    moved: tuple[str, ...]


def assign(stages: Sequence[StagePlan], workers: Sequence[WorkerLoad], *, current: Plan) -> Assignment:
    """Give each stage its number of workers.

    A worker stays when it goes on in the new stage that overlaps its old range most (by ratio of lengths; of
    equals the lower). As many stay as the counts allow, those with the most context first, since moving them
    would disturb most; the others fill what is open, nearest stage first. Ties go by worker id. If the counts
    do not add up to the workers, they are scaled first (`scale_counts`).
    """
    counts = scale_counts([s.num_workers for s in stages], len(workers))
    home = {i: _best_overlap(old, stages) for i, old in enumerate(current.stages)}
    ordered = sorted(workers, key=lambda w: (-w.context_tokens, w.worker_id))
    chosen: list[list[str]] = [[] for _ in stages]
    leavers: list[tuple[int | None, str]] = []
    for worker in ordered:
        old = current.stage_of_worker(worker.worker_id)
        target = home[old] if old is not None else None
        if target is not None and len(chosen[target]) < counts[target]:
            chosen[target].append(worker.worker_id)
        else:
            leavers.append((target, worker.worker_id))
    moved: list[str] = []
    # those known to the old plan choose first, so that a newcomer takes what is left
    for target, worker_id in sorted(leavers, key=lambda pair: pair[0] is None):
        free = [i for i in range(len(stages)) if len(chosen[i]) < counts[i]]
        if target is None:
            stage = max(free, key=lambda i: (counts[i] - len(chosen[i]), -i))
        else:
            stage = _nearest(free, target)
            moved.append(worker_id)
        chosen[stage].append(worker_id)
    filled = tuple(
        replace(s, num_workers=len(ids), worker_ids=tuple(sorted(ids)))
        for s, ids in zip(stages, chosen, strict=True)
    )
    return Assignment(stages=filled, moved=tuple(sorted(moved)))


def scale_counts(counts: Sequence[int], total: int) -> list[int]:
    """Whole numbers in the proportion of `counts` that add up to `total`, by largest remainder.

    Each stage gets at least one while there are enough; the first stages come first when there are not.
    """
    if not counts:
        return []
    if total <= len(counts):
        # too few for all: the stages that were to have most, ties to the lower one
        order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:total]
        return [1 if i in order else 0 for i in range(len(counts))]
    asked = [max(1, c) for c in counts]
    if sum(asked) == total:
        return asked
    spare = total - len(counts)
    weight = sum(asked)
    shares = [spare * c / weight for c in asked]
    result = [1 + int(s) for s in shares]
    order = sorted(range(len(counts)), key=lambda i: (-(shares[i] - int(shares[i])), i))
    for i in order[: total - sum(result)]:
        result[i] += 1
    return result


def _nearest(stages: Sequence[int], target: int) -> int:
    return min(stages, key=lambda i: (abs(i - target), i))


def _best_overlap(old: StagePlan, stages: Sequence[StagePlan]) -> int:
    return max(range(len(stages)), key=lambda i: (_overlap(old, stages[i]), -i))


def _overlap(a: StagePlan, b: StagePlan) -> float:
    """Shared part of two ranges on a logarithmic scale, as a share of their union."""
    a_low, a_high, b_low, b_high = _log(a.low_tokens), _log(a.high_tokens), _log(b.low_tokens), _log(b.high_tokens)
    shared = min(a_high, b_high) - max(a_low, b_low)
    return max(0.0, shared) / (max(a_high, b_high) - min(a_low, b_low))


def _log(tokens: int | None) -> float:
    """Logarithm with 16 tokens as the unit of the short end and 2^21 standing for no upper end."""
    return 21.0 if tokens is None else log2(max(16, tokens)) if tokens else 3.0

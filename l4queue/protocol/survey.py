"""The survey: what every worker looks at, in one reply that workers of a fleet share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from l4queue.compat import MAX_NUMBER, object_of
from l4queue.errors import UnreadableValue
from l4queue.models import WorkerLoad
from l4queue.policy.loads import NEWS_INTERVAL_S
from l4queue.protocol.calls import Call
from l4queue.protocol.foreign import or_else
from l4queue.protocol.keys import Keys
from l4queue.protocol.parsing import load_from_json

__all__ = ("KEPT_MS", "MOST_WORKERS", "Survey", "SurveyedQueue", "brief_of", "kept_survey", "survey")

KEPT_MS = round(NEWS_INTERVAL_S * 500)
"""A survey serves every look within half the interval between two, ms: loads are as old as that anyway."""
MOST_WORKERS = 128
"""Of more workers this number is drawn anew with each survey. Chosen: 12 kB a look, and the best of them is nearly
as good as the best of all."""
_MOST_OUTPUTS = 64
"""Latest outputs of a survey. Chosen: workers learn from thousands, and one that looks twice a second misses some
where more than 128 a second end."""
_BRIEF = (
    "stage",
    "num_running",
    "context_tokens",
    "pending_prefill_tokens",
    "longest_prefill_tokens",
    "prefill_due_ms",
    "copies_due_ms",
    "kv_used_tokens",
    "kv_capacity_tokens",
    "max_running",
    "is_draining",
    "is_emptying",
    "can_empty",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedQueue:
    """A queue: what waits, how much of it is not background, when some of that came last, and who is first."""

    stage: str
    tokens: int
    num_requests: int
    num_foreground: int
    foreground_ms: int | None
    head_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The fleet at one moment of the server's clock. Of `num_workers` some are drawn where they are many.

    A load says what siblings decide by. `outputs` are lengths of ended requests by the ids of their endings.
    """

    at_ms: int
    plan_version: int
    num_workers: int
    workers: tuple[WorkerLoad, ...]
    queues: tuple[SurveyedQueue, ...]
    inbox: int
    outputs: tuple[tuple[str, int], ...]
    has_older: bool = False  # a worker of a release that tells no brief: nobody wakes it by name

    @property
    def share(self) -> float:
        """Share of the fleet that `workers` has, 0 to 1."""
        return 1.0 if self.num_workers <= MOST_WORKERS else len(self.workers) / self.num_workers


def brief_of(load: WorkerLoad) -> str:
    """What siblings decide by, for `renew`: numbers in a fixed order, to which later releases may add."""
    return " ".join(f"{float(getattr(load, name)):.15g}" for name in _BRIEF)


def survey(keys: Keys, *, max_age_ms: int = 0) -> Call[Survey | None]:
    """Survey the fleet, unless another worker did within `max_age_ms`. None: what it has cannot be read."""
    args = (max_age_ms, KEPT_MS, MOST_WORKERS, _MOST_OUTPUTS)
    return Call("survey", (keys.workers, keys.survey), args, partial(_read, keys))


def kept_survey(keys: Keys) -> Call[Survey | None]:
    """What another worker surveyed a moment ago; None when nobody did."""
    return Call(None, (), ("GET", keys.survey), partial(_read, keys))


def _read(keys: Keys, reply: bytes | None) -> Survey | None:
    return or_else(keys.survey, partial(_parse, keys), lambda: None)(reply) if reply else None


@lru_cache(maxsize=4)
def _parse(keys: Keys, reply: bytes) -> Survey:
    """Workers of one process share what they read."""
    at, _, told = reply.decode(errors="replace").partition(" ")
    found = json.loads(told)
    workers = [
        or_else(keys.worker(name), _load, lambda: None)((name, told)) for name, told in _rows(found["workers"], 2)
    ]
    return Survey(
        at_ms=int(at),
        plan_version=_number(found["plan"]),
        num_workers=found["num_workers"],
        workers=tuple(sorted(filter(None, workers), key=lambda load: (load.worker_id, load.incarnation))),
        queues=tuple(
            SurveyedQueue(
                stage=stage,
                tokens=max(0, _number(tokens)),
                num_requests=num,
                num_foreground=others,
                foreground_ms=_number(came_ms) if came_ms else None,
                head_id=head_id,
            )
            for stage, tokens, num, others, came_ms, head_id in _rows(found["queues"], 6)
        ),
        inbox=found["inbox"],
        has_older=any(brief.startswith("{") for _, brief in _rows(found["workers"], 2)),
        outputs=tuple((ending, int(tokens)) for ending, tokens in _rows(found["outputs"], 2)),
    )


def _rows(flat: Iterable[Any], width: int) -> Iterator[tuple[Any, ...]]:
    """Rows of a list that has them one after another; an empty list of Lua comes as an object."""
    values = list(flat)
    return zip(*(values[i::width] for i in range(width)), strict=True)


def _number(told: str) -> int:
    """A number that anybody may have written; 0 for anything else."""
    try:
        return int(float(told))
    except (ValueError, OverflowError):
        return 0


def _load(told: tuple[str, str]) -> WorkerLoad:
    """A load from its brief, or from the whole one that a worker of an older release tells."""
    incarnation, brief = told
    if brief.startswith("{"):
        return load_from_json(object_of(brief, what="load"))
    numbers = [float(number) for number in brief.split(" ")]
    if len(numbers) < len(_BRIEF) or not all(0.0 <= number <= MAX_NUMBER for number in numbers):
        raise UnreadableValue(f"no brief of a load: {brief:.40}")
    values = dict(zip(_BRIEF, numbers, strict=False))
    return WorkerLoad(
        worker_id=incarnation.rpartition(":")[0] or incarnation,
        incarnation=incarnation,
        prefill_due_ms=values.pop("prefill_due_ms"),
        copies_due_ms=values.pop("copies_due_ms"),
        is_draining=bool(values.pop("is_draining")),
        is_emptying=bool(values.pop("is_emptying")),
        can_empty=bool(values.pop("can_empty")),
        **{name: int(number) for name, number in values.items()},  # type: ignore[arg-type]
    )

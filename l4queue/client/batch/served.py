"""Models that are served, as workers publish them, and the check of the model that a line asks for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from l4queue.errors import InvalidRequest
from l4queue.models import WorkerLoad

__all__ = ("ModelNotServed", "ServedModels")

_LOOK_EVERY_S = 5.0  # chosen: as long as a lease; workers seldom change
_LOOK_FOR_NEW_S = 1.0  # where an answer is by a worker that has not been seen


class ModelNotServed(InvalidRequest):
    """A line asks for a model that no worker serves."""


class ServedModels:
    """The names of the served models, as of the last look.

    They are not known while no worker lives, and where all are of a release that does not publish them: then
    every model passes. `any_model` lets every model pass, too.
    """

    def __init__(self, *, any_model: bool) -> None:
        self._any_model = any_model
        self._names: tuple[str, ...] = ()
        self._by_worker: dict[str, str] = {}  # also of workers that have left: their answers are still to come
        self._looked_s = -_LOOK_EVERY_S

    def is_due(self, answered_by: Iterable[str | None] = ()) -> bool:
        """Whether it is time to look again, by these workers that have answered, too."""
        age_s = time.monotonic() - self._looked_s
        has_new = any(worker_id and worker_id not in self._by_worker for worker_id in answered_by)
        return age_s >= (_LOOK_FOR_NEW_S if has_new else _LOOK_EVERY_S)

    def seen(self, workers: Sequence[WorkerLoad]) -> None:
        """Workers with a valid lease, now."""
        self._looked_s = time.monotonic()
        does_each_tell = all(load.models for load in workers)
        self._names = tuple(dict.fromkeys(n for load in workers for n in load.models)) if does_each_tell else ()
        self._by_worker.update({load.worker_id: load.models[0] if load.models else "" for load in workers})

    def check(self, model: str) -> None:
        """ModelNotServed for a name of a line that no worker has; an empty one asks for none."""
        if model and self._names and not self._any_model and model not in self._names:
            served = " or ".join(self._names)
            told = f"{model} is not served; {served} is. With --any-model (any_model=True) any name passes"
            raise ModelNotServed(told, field="model")

    def answered(self, worker_id: str | None, *, asked: str) -> str:
        """The model that an answer carries: its worker's, else the one that was asked for."""
        return self._by_worker.get(worker_id or "") or asked

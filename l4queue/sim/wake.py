"""The race for an arrival: all workers with room are woken at once, and the lightest is first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from l4queue.policy.admission import pull_delay_ms
from l4queue.policy.loads import backlog_ms
from l4queue.sim.engine.instance import Instance

__all__ = ("WAKE_JITTER_MS", "WakeRace", "backlog_of")

WAKE_JITTER_MS = 1.0
"""An assumption for workers that have a core each (docs/simulator.md)."""


def backlog_of(instance: Instance) -> float:
    """Work before the engine now, ms."""
    return backlog_ms(
        instance.num_requests,
        instance.held_tokens,
        pending_prefill_tokens=instance.pending_tokens,
        cost=instance.cost,
    )


class WakeRace:
    """The first of several engines to take a request: each lets others go first as live workers do, and is late.

    The pause is the live one (`pull_delay_ms`); the delay is exponential with a mean of `jitter_ms`.
    With 0 the engine with the least backlog is always the first; where the delay is much longer than the pauses,
    as where many workers share few cores, any of them is.
    """

    def __init__(self, rng: np.random.Generator, *, jitter_ms: float) -> None:
        self._rng = rng
        self._jitter_ms = jitter_ms

    def first(self, engines: Sequence[Instance], *, has_room: Callable[[Instance], bool]) -> Instance | None:
        """One instance with room, None where none has any; of equals the first.

        Few are asked whether they have room: from the lightest on until one has, and then in the order in which
        they would be there.
        """
        before = [backlog_of(engine) for engine in engines]
        by_backlog = sorted(range(len(engines)), key=before.__getitem__)
        lightest = next((k for k in by_backlog if has_room(engines[k])), None)
        if lightest is None or not self._jitter_ms:
            return None if lightest is None else engines[lightest]
        late = self._rng.exponential(self._jitter_ms, len(engines)).tolist()
        woken = [
            pull_delay_ms(own_ms, lightest_ms=before[lightest]) + late_ms
            for own_ms, late_ms in zip(before, late, strict=True)
        ]
        by_wake = sorted(range(len(engines)), key=woken.__getitem__)
        return next(engines[k] for k in by_wake if k == lightest or has_room(engines[k]))

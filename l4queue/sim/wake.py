"""Who takes what arrives in a queue: all workers with room are woken at once, and one of them is the first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from l4queue.policy.room import give_way_ms
from l4queue.sim.instance import Instance

__all__ = ("WAKE_JITTER_MS", "WakeRace", "backlog_ms")

WAKE_JITTER_MS = 1.0
"""An assumption for workers that have a core each (docs/simulator.md)."""


def backlog_ms(instance: Instance) -> float:
    """What the engine has before it now, as `policy.loads.batch_ms` of a worker's load."""
    cost = instance.cost
    return (
        cost.beta_ms * instance.num_decodes
        + cost.gamma_ms * instance.context_tokens
        + cost.pi_ms * instance.pending_tokens
    )


class WakeRace:
    """The first of several engines to take a request: each lets others go first as live workers do, and is late.

    The pause is the live one (`policy.room.give_way_ms`); the delay is exponential with a mean of `jitter_ms`.
    With 0 the engine with the least backlog is always the first; where the delay is much longer than the pauses,
    as where many workers share few cores, any of them is.
    """

    def __init__(self, rng: np.random.Generator, *, jitter_ms: float) -> None:
        self._rng = rng
        self._jitter_ms = jitter_ms

    def first(self, able: Sequence[Instance]) -> Instance:
        """One of these, of which there is at least one; of equals the one that stands first."""
        if not self._jitter_ms or len(able) == 1:
            return min(able, key=backlog_ms)
        late = self._rng.exponential(self._jitter_ms, len(able)).tolist()
        before = [backlog_ms(instance) for instance in able]
        lightest_ms = min(before)
        pauses = (give_way_ms(batch_ms, lightest_ms=lightest_ms) for batch_ms in before)
        woken = [pause_ms + late_ms for pause_ms, late_ms in zip(pauses, late, strict=True)]
        return able[woken.index(min(woken))]

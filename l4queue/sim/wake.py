"""Who takes an arrival: the lightest engine with room, which alone is woken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from l4queue.policy.loads import backlog_ms
from l4queue.sim.engine.instance import Instance

__all__ = ("backlog_of", "woken_of")


def backlog_of(instance: Instance) -> float:
    """Work before the engine now, ms."""
    return backlog_ms(
        instance.num_requests,
        instance.held_tokens,
        pending_prefill_tokens=instance.pending_tokens,
        cost=instance.cost,
    )


def woken_of(engines: Sequence[Instance], *, has_room: Callable[[Instance], bool]) -> Instance | None:
    """The engine that is woken for the head of a queue, as live; of equals the first, None where none has room.

    A live worker tells its work with every take, and twice a second; here it is known as of now.
    """
    return next((engine for engine in sorted(engines, key=backlog_of) if has_room(engine)), None)

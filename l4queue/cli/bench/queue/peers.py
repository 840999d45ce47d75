"""The peers: other task queues on Redis, how each is installed and its worker started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ("PEERS", "Peer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One task queue. `worker`: arguments to its interpreter, after which the script of `entrants/` is found.

    All have 64 jobs at once where they are asynchronous, else what their documentation has; see each script.
    """

    name: str
    pins: tuple[str, ...]
    worker: tuple[str, ...]
    client: tuple[str, ...]
    is_node: bool = False


def _asyncio_peer(name: str, *pins: str) -> Peer:
    """One whose script runs its worker too."""
    script = f"{{scripts}}/on_{name}.py"
    return Peer(name=name, pins=pins, worker=(script, "worker"), client=(script, "client"))


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="bullmq",
            pins=("bullmq@6.7.0", "ioredis@6.0.0"),
            worker=("{scripts}/on_bullmq.mjs", "worker"),
            client=("{scripts}/on_bullmq.mjs", "client"),
            is_node=True,
        ),
        _asyncio_peer("saq", "saq[redis,hiredis]==0.26.4", "typing_extensions", "uvloop==0.23.0"),
        Peer(
            name="dramatiq",
            pins=("dramatiq[redis]==2.2.1", "redis[hiredis]==8.1.0"),
            worker=("-m", "dramatiq", "on_dramatiq", "--processes", "1", "--threads", "8"),
            client=("{scripts}/on_dramatiq.py", "client"),
        ),
        _asyncio_peer("arq", "arq==0.28.0", "redis[hiredis]==5.3.1", "uvloop==0.23.0"),
        Peer(
            name="taskiq",
            pins=("taskiq==0.13.0", "taskiq-redis==1.2.4", "redis[hiredis]==8.1.0", "uvloop==0.23.0"),
            worker=(
                *("-m", "taskiq", "worker", "on_taskiq:broker", "--workers", "1"),
                *("--max-async-tasks", "64", "--log-level", "WARNING"),
            ),
            client=("{scripts}/on_taskiq.py", "client"),
        ),
        _asyncio_peer("streaq", "streaq==7.2.0", "uvloop==0.23.0"),
        _asyncio_peer("celery", "celery[redis]==5.7.0", "redis[hiredis]==8.1.0"),
    )
}
"""By name, in the order in which they are measured. The pins are the newest releases of 2026-11."""

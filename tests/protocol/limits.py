"""Charges and refunds of a caller named ann, for tests."""

from __future__ import annotations

from typing import Any

from l4queue.protocol.limits import Allowance, Charge, Limits
from tests.protocol.scene import Scene

__all__ = ("MINUTE_MS", "charge", "charge_lines", "charged", "pass_ms", "refund")

MINUTE_MS = 60_000


def charge(scene: Scene, *ids: str, tokens: int = 10, num_requests: int = 1, **most: int) -> Charge:
    """Of one request of HTTP."""
    wanted = dict.fromkeys(ids, tokens)
    call = Limits(scene.keys).charge("ann", Allowance(**most), tokens=wanted, num_requests=num_requests)
    return scene.executor.run(call)


def charge_lines(scene: Scene, *ids: str, tokens: int = 10, **most: int) -> Charge:
    """Of lines of a batch, which may fill half of each limit."""
    wanted = dict.fromkeys(ids, tokens)
    call = Limits(scene.keys).charge_lines("ann", Allowance(**most), tokens=wanted, share=0.5)
    return scene.executor.run(call)


def refund(scene: Scene, *ids: str, used: int, **most: int) -> int:
    """Of requests that have used so much each."""
    call = Limits(scene.keys).refund("ann", Allowance(**most), used_tokens=dict.fromkeys(ids, used))
    return scene.executor.run(call)


def pass_ms(scene: Scene, ms: int) -> None:
    """As if the levels were so much older."""
    scene.raw.hincrby(scene.keys.limit("ann"), "at", -ms)


def charged(scene: Scene) -> dict[str, int]:
    """Tokens by id."""
    found: dict[bytes, Any] = scene.raw.hgetall(scene.keys.charged("ann"))
    return {name.decode(): int(value.split()[0]) for name, value in found.items()}

"""The interface of a simulated scheduling policy: hooks without output lengths, and verbs of the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest

if TYPE_CHECKING:
    from l4queue.sim.cluster import Cluster

__all__ = ("Policy",)


class Policy:
    """Base of all policies: does nothing but keep its cluster. Subclasses override the hooks they need.

    `tick_s` is the period of `on_tick`; None: no ticks. Online policies must not read `output_tokens`.
    """

    name = ""
    tick_s: float | None = None
    cluster: Cluster

    def attach(self, cluster: Cluster) -> None:
        """Called once before the first event."""
        self.cluster = cluster

    @property
    def num_queued(self) -> int:
        """Requests that the policy holds itself, in no engine."""
        return 0

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """A request has arrived; put it somewhere."""
        raise NotImplementedError

    def on_boundary(self, instance: Instance, now_s: float) -> None:
        """An engine is between two segments: it may be given work."""

    def on_started(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """These requests have their first token."""

    def on_finished(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """These requests are done; their lengths are known now."""

    def on_alarm(self, instance: Instance, request: SimRequest, now_s: float) -> None:
        """A watched request has grown to the length asked for."""

    def on_removed(self, instance: Instance, request: SimRequest, tag: object, now_s: float) -> None:
        """An engine has released a request that was asked back."""
        raise NotImplementedError

    def on_tick(self, now_s: float) -> None:
        """The period has passed."""

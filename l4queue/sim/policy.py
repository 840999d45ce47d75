"""The interface of a simulated scheduling policy: hooks without output lengths, and verbs of the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest

__all__ = ("Fleet", "Policy")


class Fleet(Protocol):
    """The part of a cluster that a policy may use: engines and constants to read, and verbs."""

    @property
    def instances(self) -> Sequence[Instance]:
        """The engines, by index."""

    @property
    def cost(self) -> StepCost:
        """Cost of a step, the same for all engines."""

    @property
    def price(self) -> MovePrice:
        """Price of moving a running request now."""

    @property
    def rng(self) -> np.random.Generator:
        """The only source of chance."""

    @property
    def now_s(self) -> float:
        """Time of the present event, s."""

    def copies_due_ms(self, instance: Instance) -> float:
        """KV caches on their way out of an engine and into it, as `WorkerLoad` has it, ms."""

    def push(self, request: SimRequest, instance: Instance) -> None:
        """Give a request to an engine now; a decode run there ends at its next boundary."""

    def push_stolen(self, request: SimRequest, thief: Instance) -> None:
        """As `push`, for a waiting request of another stage."""

    def ask_back(self, request: SimRequest, instance: Instance, tag: object) -> None:
        """Have a running request released at the next boundary; the policy then gets `on_removed`."""

    def send(self, request: SimRequest, target: Instance) -> None:
        """Hand a released request over to another engine, by KV transfer or by prefilling again."""

    def steal(self, request: SimRequest, target: Instance) -> None:
        """As `send`, for a running request that an idle engine has asked for."""


class Policy:
    """Base of all policies: does nothing but keep its cluster. Subclasses override the hooks they need.

    `tick_s` is the period of `on_tick`; None: no ticks. Online policies must not read `output_tokens`.
    """

    name = ""
    tick_s: float | None = None
    cluster: Fleet

    def attach(self, cluster: Fleet) -> None:
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

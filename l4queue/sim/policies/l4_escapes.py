"""Escapes in the simulator: running requests leave before a long prefill, by the live system's function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from l4queue.policy.escape import REST_MS, EscapeTarget, escapes, may_escape, sample_siblings
from l4queue.policy.steal import RunningRequest, StealLimits
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.prefixes import Prefixes
from l4queue.sim.policies.views import load_of, running_request, with_copies

__all__ = ("Escapes",)


class Escapes:
    """Who has moved when, and what moves now. `ahead_ms(pending_tokens, stage)`: the prefill before what runs."""

    def __init__(
        self,
        instances: Sequence[Instance],
        *,
        cost: StepCost,
        price: Callable[[], MovePrice],
        limits: StealLimits,
        copies_due_ms: Callable[[Instance], float],
        ahead_ms: Callable[[int, int], float],
        expected_remaining: Callable[[int], float],
        rng: np.random.Generator,
        prefixes: Prefixes | None = None,
    ) -> None:
        self._instances = instances
        self._cost, self._price, self._limits = cost, price, limits
        self._copies_due_ms = copies_due_ms
        self._ahead_ms, self._expected_remaining = ahead_ms, expected_remaining
        self._rng = rng
        self._prefixes = prefixes
        self._moved_s: dict[SimRequest, float] = {}

    def forget(self, requests: Sequence[SimRequest]) -> None:
        """These are done."""
        for request in requests:
            self._moved_s.pop(request, None)

    def moves(self, instance: Instance, now_s: float) -> list[tuple[SimRequest, Instance]]:
        """Requests that leave this engine now, with their targets."""
        if not instance.num_decodes or len(self._instances) < 2:
            return []
        in_flight = len(instance.removals)
        here = self._load_of(instance)
        price = self._price()
        can_pay = may_escape(here.pending_prefill_tokens, cost=self._cost, price=price)
        if not can_pay or in_flight >= self._limits.max_moves:
            return []
        ahead_ms = self._before_ms(instance)
        targets = self._targets(instance, ahead_ms)
        if not targets:
            return []
        running, by_id = self._running(instance, now_s)
        found = escapes(
            running,
            here=here,
            ahead_ms=ahead_ms,
            targets=[target for target, _ in targets],
            moves_in_flight=in_flight,
            cost=self._cost,
            price=price,
            limits=self._limits,
            reuse_share=self._prefixes.hit_share if self._prefixes is not None else 0.0,
        )
        instances = {target.load.worker_id: other for target, other in targets}
        moved = [(by_id[escape.request_id], instances[escape.target_id]) for escape in found]
        self._moved_s.update((request, now_s) for request, _ in moved)
        return moved

    def _running(self, instance: Instance, now_s: float) -> tuple[list[RunningRequest], dict[str, SimRequest]]:
        """The requests that may leave, and the same by their names."""
        rested_s = now_s - REST_MS / 1000
        running, by_id = [], {}
        for request, length in instance.decoding_lengths():
            if request in instance.removals or self._moved_s.get(request, rested_s) > rested_s:
                continue
            item = running_request(request, length, expected_remaining=self._expected_remaining)
            if self._prefixes is not None:
                item = replace(item, held_tokens=self._prefixes.held_elsewhere(request))
            by_id[item.request_id] = request
            running.append(item)
        return running, by_id

    def _targets(self, instance: Instance, ahead_ms: float) -> list[tuple[EscapeTarget, Instance]]:
        """Some of the others, those with less prefill before them."""
        others = sample_siblings([other for other in self._instances if other is not instance], draw=self._draw)
        known = ((other, self._before_ms(other)) for other in others)
        return [
            (EscapeTarget(load=self._load_of(other), ahead_ms=there_ms), other)
            for other, there_ms in known
            if there_ms < ahead_ms
        ]

    def _load_of(self, instance: Instance) -> WorkerLoad:
        load = load_of(instance) if self._prefixes is None else self._prefixes.load_of(instance)
        return with_copies(load, self._copies_due_ms(instance))

    def _before_ms(self, instance: Instance) -> float:
        """Prefill before what an engine runs: where prefixes are known, by what each prompt did not find."""
        if self._prefixes is not None:
            return self._prefixes.due_ms(instance)
        return self._ahead_ms(instance.pending_tokens, instance.stage)

    def _draw(self, num_all: int, num_drawn: int) -> list[int]:
        drawn: list[int] = self._rng.choice(num_all, num_drawn, replace=False).tolist()
        return drawn

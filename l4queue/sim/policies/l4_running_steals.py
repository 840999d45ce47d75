"""Stealing of running requests in the simulator, once a tick, by the live system's functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.policy.steal import Ask, Bid, RunningRequest, StealLimits, ask, bid, choose_victim, match
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.views import load_of, running_request, with_copies, worker_id

__all__ = ("PendingMove", "RunningSteals")


@dataclass(frozen=True, slots=True)
class PendingMove:
    """Where a request that an engine was asked to release is to go, and whether it was stolen."""

    target: Instance
    is_steal: bool


class RunningSteals:
    """Who has moved what, and what may move now."""

    def __init__(
        self,
        *,
        cost: StepCost,
        price: Callable[[], MovePrice],
        limits: StealLimits,
        copies_due_ms: Callable[[Instance], float],
    ) -> None:
        self._copies_due_ms = copies_due_ms
        self._cost, self._price, self._limits = cost, price, limits
        self._last_ask_ms: dict[str, int] = {}
        self._last_move_ms: dict[str, int] = {}
        self._came_from: dict[SimRequest, str] = {}
        # from, to, and what marks the stay in the batch that it is to leave: it has moved when that has changed
        self._in_flight: dict[SimRequest, tuple[str, str, int]] = {}

    def forget(self, requests: Sequence[SimRequest]) -> None:
        """These are done."""
        for request in requests:
            self._came_from.pop(request, None)
            self._in_flight.pop(request, None)

    def moves(
        self,
        instances: Sequence[Instance],
        *,
        num_waiting: int,
        now_s: float,
        expected_remaining: Callable[[int], float],
    ) -> list[tuple[SimRequest, Instance, Instance]]:
        """Running requests to move now: request, from, to. None while anything waits in a queue."""
        if num_waiting:
            return []
        now_ms = round(now_s * 1000)
        self._in_flight = {r: m for r, m in self._in_flight.items() if r.join_base == m[2]}
        moving = Counter(name for move in self._in_flight.values() for name in move[:2])
        by_id = {worker_id(i): i for i in instances}
        bids, asks, running = self._bids(instances, by_id, moving, now_ms, expected_remaining)
        found = []
        for transfer in match(asks, bids, moves_in_flight=moving, limits=self._limits):
            request = running[transfer.request_id]
            self._came_from[request] = transfer.source_id
            self._in_flight[request] = (transfer.source_id, transfer.target_id, request.join_base)
            self._last_move_ms[transfer.source_id] = now_ms
            found.append((request, by_id[transfer.source_id], by_id[transfer.target_id]))
        return found

    def _bids(
        self,
        instances: Sequence[Instance],
        by_id: Mapping[str, Instance],
        moving: Counter[str],
        now_ms: int,
        expected_remaining: Callable[[int], float],
    ) -> tuple[list[Bid], list[Ask], dict[str, SimRequest]]:
        """Offer of the sibling that each idle engine asks."""
        loads = {name: with_copies(load_of(i), self._copies_due_ms(i)) for name, i in by_id.items()}
        items: dict[str, list[RunningRequest]] = {}
        running: dict[str, SimRequest] = {}
        bids: list[Bid] = []
        asks: list[Ask] = []
        for name, load in loads.items():
            request = ask(
                load,
                num_waiting_anywhere=load.num_waiting_in_engine,
                moves_in_flight=moving[name],
                last_move_ms=self._last_ask_ms.get(name),
                now_ms=now_ms,
                cost=self._cost,
                limits=self._limits,
            )
            if request is None:
                continue
            victim = choose_victim(load, tuple(loads.values()), cost=self._cost, limits=self._limits)
            if victim is None:
                continue
            asks.append(request)
            self._last_ask_ms[name] = now_ms
            if victim.worker_id not in items:
                source = by_id[victim.worker_id]
                items[victim.worker_id] = self._running(source, running, expected_remaining)
            bids += bid(
                victim,
                items[victim.worker_id],
                request,
                moves_in_flight=moving[victim.worker_id],
                last_move_ms=self._last_move_ms.get(victim.worker_id),
                now_ms=now_ms,
                cost=self._cost,
                price=self._price(),
                limits=self._limits,
            )
        return bids, asks, running

    def _running(
        self, victim: Instance, running: dict[str, SimRequest], expected_remaining: Callable[[int], float]
    ) -> list[RunningRequest]:
        items = []
        for request, length in victim.decoding_lengths():
            if request in victim.removals or request in self._in_flight:
                continue
            came_from = self._came_from.get(request)
            item = running_request(request, length, expected_remaining=expected_remaining, came_from=came_from)
            running[item.request_id] = request
            items.append(item)
        return items

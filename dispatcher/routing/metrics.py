"""Prometheus counters of one dispatcher: requests routed and refused. The exporter reports the queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from l4queue.metrics import Families, Tally, Values
from l4queue.protocol.keys import is_private_queue

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ("RouterCounters",)

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Bucket bounds of a round and of counting tokens, s: three a decade, from one short prompt to a full batch."""
_REASONS = ("invalid", "too_long", "unreadable", "poison")


class RouterCounters:
    """Counted by the dispatcher as it routes; a source of metrics."""

    def __init__(self) -> None:
        self.routed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter(dict.fromkeys(_REASONS, 0))
        self.rounds = Tally(_SECONDS)
        self.counting = Tally(_SECONDS)

    def count_routed(self, stage: str) -> None:
        """One more; the own queues of workers are one, since their names come and go without end."""
        self.routed["worker" if is_private_queue(stage) else stage] += 1

    def collect(self) -> Iterator[Metric]:
        """Everything."""
        families = Families()
        routed: Values = {(stage,): float(number) for stage, number in list(self.routed.items())}
        refused: Values = {(reason,): float(number) for reason, number in list(self.refused.items())}
        families.counter("dispatcher_requests_routed", "Requests by the stage it chose", routed, labels=("stage",))
        families.counter("dispatcher_requests_refused", "Requests that can never run", refused, labels=("reason",))
        families.histogram("dispatcher_round_seconds", "Rounds that had something to route", {(): self.rounds})
        families.histogram("dispatcher_tokenize_seconds", "Counting the prompts of a round", {(): self.counting})
        yield from families.found

"""Latency histograms of finished requests, by stage and length, read from the stream of outcomes.

The times are those in the records, by the clock of Redis, so the request itself is not slowed by being measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from l4queue.metrics import Families, Labels, Tally
from l4queue.models import RequestState
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import FinishedRequest, Reads

__all__ = ("Latencies", "length_class")

_PAGE = 2000
"""Outcomes of one read. Chosen: it bounds a reply; what is left is read at once."""
_LENGTH_BOUNDS_TOKENS = (256, 2048, 16_384)
"""Upper ends of the length classes, tokens. Chosen: factors of eight; each class more multiplies all series."""
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
"""Bucket bounds of waits and latencies, s: two to three a decade, from a first token to an hour."""
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
"""Bucket bounds of the time for a token, s: densest from 10 to 50 ms, where the steps of an engine lie."""
_LABELS = ("stage", "length_class")

_Series = dict[Labels, Tally]


def length_class(prompt_tokens: int) -> str:
    """The range of prompt lengths that a request counts for, such as `256-2047`."""
    low = 0
    for bound in _LENGTH_BOUNDS_TOKENS:
        if prompt_tokens < bound:
            return f"{low}-{bound - 1}"
        low = bound
    return f"{low}+"


@dataclass(slots=True)
class Latencies:
    """Counts what finished since it began; `follow` takes in what came since the last time."""

    executor: Executor
    namespace: str
    wait: _Series = field(default_factory=dict)
    first_token: _Series = field(default_factory=dict)
    per_token: _Series = field(default_factory=dict)
    end_to_end: _Series = field(default_factory=dict)
    _last_id: str | None = None

    def follow(self) -> int:
        """Count what has finished since the last call; how many requests that were. The first call counts none."""
        reads = Reads(Keys(self.namespace))
        if self._last_id is None:
            self._last_id = self.executor.run(reads.last_finished_id())
            return 0
        total = 0
        while True:
            self._last_id, page = self.executor.run(reads.finished_after(self._last_id, count=_PAGE))
            self.take(page)
            total += len(page)
            if len(page) < _PAGE:
                return total

    def take(self, finished: Sequence[FinishedRequest]) -> None:
        """Count these; only what was answered has latencies."""
        for one in finished:
            if one.state != RequestState.DONE:
                continue
            which = (one.stage, length_class(one.prompt_tokens))
            if one.started_ms is not None:
                _add(self.wait, which, (one.started_ms - one.submitted_ms) / 1000, _SECONDS)
            if one.first_token_ms is not None:
                _add(self.first_token, which, (one.first_token_ms - one.submitted_ms) / 1000, _SECONDS)
                if one.output_tokens >= 2:
                    span_s = (one.finished_ms - one.first_token_ms) / 1000
                    _add(self.per_token, which, span_s / (one.output_tokens - 1), _TOKEN_SECONDS)
            _add(self.end_to_end, which, (one.finished_ms - one.submitted_ms) / 1000, _SECONDS)

    def describe(self, families: Families) -> None:
        """As metric families."""
        for name, meaning, series in (
            ("queue_time_seconds", "From acceptance to the first worker that took it", self.wait),
            ("time_to_first_token_seconds", "From acceptance to the first readable token", self.first_token),
            ("time_per_output_token_seconds", "Per output token after the first", self.per_token),
            ("e2e_latency_seconds", "From acceptance to the stored result", self.end_to_end),
        ):
            text = f"{meaning}, of requests done, by the stage they ended in"
            families.histogram(name, text, dict(series), labels=_LABELS)


def _add(series: _Series, which: tuple[str, str], value: float, bounds: Sequence[float]) -> None:
    if which not in series:
        series[which] = Tally(bounds)
    series[which].add(value)

"""Totals of one run of a batch: lines, tokens, latencies."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from l4queue.client.batch.index import LineIndex, LineState
from l4queue.client.batch.places import BatchPlaces
from l4queue.client.batch.progress import BatchSummary
from l4queue.protocol.records import RequestRecord

__all__ = ("BatchTotals",)


@dataclass(slots=True, kw_only=True)
class BatchTotals:
    """Counts of one run."""

    num_earlier: int = 0
    num_found: int = 0
    num_recomputed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: array[float] = field(default_factory=lambda: array("f"))
    e2e_s: array[float] = field(default_factory=lambda: array("f"))

    def done(self, record: RequestRecord) -> None:
        """One request has succeeded."""
        self.prompt_tokens += record.prompt_tokens or 0
        self.output_tokens += record.offset
        for times_s, took_ms in ((self.ttft_s, record.ttft_ms), (self.e2e_s, record.e2e_ms)):
            if took_ms is not None:
                times_s.append(took_ms / 1000)

    def summary(
        self, index: LineIndex, places: BatchPlaces, *, is_complete: bool, num_in_flight: int, wall_s: float
    ) -> BatchSummary:
        """At the end of the run."""
        num_succeeded, num_failed = index.count(LineState.SUCCEEDED), index.count(LineState.FAILED)
        return BatchSummary(
            num_lines=len(index) - index.count(LineState.EMPTY),
            num_succeeded=num_succeeded,
            num_failed=num_failed,
            num_earlier=self.num_earlier,
            num_found=self.num_found,
            num_recomputed=self.num_recomputed,
            num_in_flight=num_in_flight,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            ttft_p50_s=_percentile(self.ttft_s, 50),
            ttft_p99_s=_percentile(self.ttft_s, 99),
            e2e_p50_s=_percentile(self.e2e_s, 50),
            e2e_p99_s=_percentile(self.e2e_s, 99),
            wall_s=wall_s,
            lines_per_s=(num_succeeded + num_failed - self.num_earlier) / wall_s,
            is_complete=is_complete,
            path_out=places.name_out,
            path_errors=places.name_errors,
        )


def _percentile(times_s: array[float], percent: float) -> float | None:
    return round(float(np.percentile(times_s, percent)), 6) if times_s else None

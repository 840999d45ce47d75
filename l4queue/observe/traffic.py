"""Traffic of a deployment as a trace: arrivals and lengths of the requests that have ended, no text."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from l4queue.protocol.reads import FinishedRequest

__all__ = ("COLUMNS", "RecordedRequest", "recorded", "trace_text", "write_trace")

COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
"""What `l4queue simulate` and `l4queue plan solve` read (`l4queue.sim.traces.rows.COLUMNS`)."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RecordedRequest:
    """A request as a trace has it, in order of arrival. `submitted_ms` is the server's clock."""

    submitted_ms: int
    input_tokens: int
    output_tokens: int


def recorded(request: FinishedRequest) -> RecordedRequest | None:
    """The row of a request; None for one that no engine ever ran, as it says nothing of its output."""
    if request.started_ms is None:
        return None
    return RecordedRequest(
        submitted_ms=request.submitted_ms,
        input_tokens=max(1, request.prompt_tokens),
        output_tokens=max(1, request.output_tokens),
    )


def trace_text(requests: Iterable[RecordedRequest]) -> str:
    """CSV with `COLUMNS`, sorted by arrival; the first request arrives at 0 s, times to the ms."""
    rows = sorted(requests)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        arrival_s = (row.submitted_ms - rows[0].submitted_ms) / 1000
        writer.writerow((f"{arrival_s:.3f}", row.input_tokens, row.output_tokens))
    return out.getvalue()


def write_trace(path: Path, requests: Iterable[RecordedRequest]) -> None:
    """Write `trace_text` to a file, whole or not at all; gzipped where its name ends in .gz."""
    data = trace_text(requests).encode()
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

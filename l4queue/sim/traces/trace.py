"""Request traces: arrivals and lengths, read from CSV with errors that name file, line and column."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l4queue.errors import TraceError
from l4queue.sim.engine.request import SimRequest

__all__ = ("COLUMNS", "Trace", "read_trace")

COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
MAX_TOKENS = 100_000_000
"""Longest prompt or output in a file, tokens: a hundred times what models hold; beyond it a column is mixed up."""
MAX_ARRIVAL_S = 1e9
"""Latest arrival, s: 30 years. Beyond it times are of another unit, or of a calendar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Arrivals (s, never decreasing) and lengths (tokens, ≥ 1), as arrays of one length ≥ 1."""

    name: str
    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate_rps(self) -> float:
        """Mean arrival rate, requests per second; 0 when all arrive at once."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0 else 0.0

    def scaled(self, rate_scale: float) -> Trace:
        """The same requests, arriving `rate_scale` times as fast from 0 on."""
        return Trace(
            name=self.name,
            arrival_s=(self.arrival_s - self.arrival_s[0]) / rate_scale,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
        )

    def select(self, rows: slice | Sequence[int] | NDArray[np.int64]) -> Trace:
        """The chosen rows, arrivals unchanged."""
        return Trace(
            name=self.name,
            arrival_s=self.arrival_s[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
        )

    def requests(self) -> list[SimRequest]:
        """Fresh simulator requests, one per row."""
        rows = zip(self.arrival_s.tolist(), self.input_tokens.tolist(), self.output_tokens.tolist(), strict=True)
        return [
            SimRequest(index, arrival_s, prompt_tokens=prompt, output_tokens=output)
            for index, (arrival_s, prompt, output) in enumerate(rows)
        ]


def read_trace(path: str | Path) -> Trace:
    """Read `arrival_s,input_tokens,output_tokens` from a CSV or CSV.gz file; other columns are ignored.

    Arrivals must be finite, ≥ 0 and sorted; lengths whole numbers ≥ 0. An output of 0 tokens counts as 1: an
    engine makes at least one. Raises TraceError, one line naming file, line and column.
    """
    path = Path(path)
    arrival: list[float] = []
    inputs: list[int] = []
    outputs: list[int] = []
    for line, values in _rows(path):
        at_s = _number(values[0], path=path, line=line, column=COLUMNS[0])
        if at_s > MAX_ARRIVAL_S:
            raise _error(path, line, COLUMNS[0], f"must be at most {MAX_ARRIVAL_S:g}, got {at_s:g}")
        if arrival and at_s < arrival[-1]:
            raise _error(path, line, COLUMNS[0], f"arrivals must not decrease: {at_s:g} follows {arrival[-1]:g}")
        arrival.append(at_s)
        inputs.append(max(1, _tokens(values[1], path=path, line=line, column=COLUMNS[1])))
        outputs.append(max(1, _tokens(values[2], path=path, line=line, column=COLUMNS[2])))
    if not arrival:
        raise _error(path, 2, COLUMNS[0], "the file has a header but no requests")
    return Trace(
        name=path.name.removesuffix(".gz").removesuffix(".csv"),
        arrival_s=np.array(arrival, dtype=np.float64),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
    )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and the three wanted fields of each data row."""
    reader = csv.reader(_lines(path))
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header or header == [""]:
            raise _error(path, 1, COLUMNS[0], f"the file is empty; expected a header with {', '.join(COLUMNS)}")
        for name in COLUMNS:
            if name not in header:
                raise _error(path, 1, name, f"the column is missing; the header has {_shown(', '.join(header))}")
        places = [header.index(name) for name in COLUMNS]
        for row in reader:
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            for name, place in zip(COLUMNS, places, strict=True):
                if place >= len(row):
                    raise _error(path, reader.line_num, name, f"the line has only {len(row)} fields")
            yield reader.line_num, [row[place] for place in places]
    except csv.Error as error:
        raise _error(path, reader.line_num, COLUMNS[0], f"not readable as CSV: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise _error(path, reader.line_num + 1, COLUMNS[0], f"cannot be read: {error}") from None


def _lines(path: Path) -> Iterable[str]:
    try:
        data = path.read_bytes()
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
        return io.StringIO(data.decode("utf-8-sig"), newline="")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _error(path, 1, COLUMNS[0], f"the file cannot be read: {reason}") from None


def _number(text: str, *, path: Path, line: int, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _error(path, line, column, f"not a number: {_shown(text)!r}") from None
    if not math.isfinite(value):
        raise _error(path, line, column, f"must be finite, got {_shown(text)}")
    if value < 0:
        raise _error(path, line, column, f"must not be negative, got {_shown(text)}")
    return value


def _tokens(text: str, *, path: Path, line: int, column: str) -> int:
    value = _number(text, path=path, line=line, column=column)
    if value != int(value) or value > MAX_TOKENS:
        raise _error(
            path, line, column, f"must be a whole number of tokens up to {MAX_TOKENS}, got {_shown(text)}"
        )
    return int(value)


def _shown(text: str) -> str:
    """A text of the file in an error, which is one line."""
    return " ".join(text.split())[:80]


def _error(path: Path, line: int, column: str, what: str) -> TraceError:
    return TraceError(f"{path}:{line}: {column}: {what}")

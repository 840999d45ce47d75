"""Rows of trace files, CSV (Azure's too) or Mooncake's JSON lines, with errors that name file, line and column."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from l4queue.errors import TraceError

__all__ = ("COLUMNS", "HASH_IDS", "Row", "csv_rows", "ids_beside", "mooncake_rows", "trace_error")

COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
HASH_IDS = "hash_ids"
GROUP = "group"
MOONCAKE = ("timestamp", "input_length", "output_length")
"""Their names in Mooncake's files; the first in ms."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Their names in the CSV files of Azure's LLM inference traces (2023, 2024); the first is a moment."""
MAX_TOKENS = 100_000_000
"""Longest prompt or output in a file, tokens: a hundred times what models hold; beyond it a column is mixed up."""
MAX_ARRIVAL_S = 1e9
"""Latest arrival, s: 30 years. Beyond it times are of another unit, or of a calendar."""

_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request. `ids` and `group` are None where the file has none; `line` is its last line."""

    line: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    ids: list[int] | None = None
    group: str | None = None


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV file with the columns `COLUMNS`, and perhaps `hash_ids` and `group`, in any order.

    With Azure's columns instead the first request arrives at 0 s.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    before_s, first_s = 0.0, math.nan
    try:
        header = [name.strip() for name in next(reader, [])]
        is_azure = set(AZURE) <= set(header)
        places = _places(path, header, AZURE if is_azure else COLUMNS)
        ids_at, group_at = (header.index(name) if name in header else None for name in (HASH_IDS, GROUP))
        for fields in reader:
            if not fields or (len(fields) == 1 and not fields[0].strip()):
                continue
            line = reader.line_num
            for name, place in {**places, HASH_IDS: ids_at or 0}.items():
                if place >= len(fields):
                    raise trace_error(path, line, name, f"the line has only {len(fields)} fields")
            group = None if group_at is None else fields[group_at] if group_at < len(fields) else ""
            ids = None if ids_at is None else _ids(fields[ids_at], path=path, line=line)
            texts = [fields[place] for place in places.values()]
            if is_azure:
                moment_s = _moment_s(texts[0], path=path, line=line)
                first_s = moment_s if math.isnan(first_s) else first_s
                texts[0] = f"{moment_s - first_s:.6f}"
            row = _row(texts, path=path, line=line, before_s=before_s, ids=ids, group=group)
            before_s = row.arrival_s
            yield row
    except csv.Error as error:
        raise trace_error(path, reader.line_num, COLUMNS[0], f"not readable as CSV: {error}") from None


def mooncake_rows(path: Path) -> Iterator[Row]:
    """Rows of Mooncake's JSON lines: `timestamp` in ms, `input_length`, `output_length`, `hash_ids`."""
    before_s = 0.0
    for line, text in enumerate(_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            found: Any = json.loads(text)
        except ValueError as error:
            raise trace_error(path, line, MOONCAKE[0], f"not readable as JSON: {error}") from None
        for name in MOONCAKE:
            if not isinstance(found, dict) or name not in found:
                raise trace_error(path, line, name, "the key is missing")
        texts = [str(found[name]) for name in MOONCAKE]
        texts[0] = str(_number(texts[0], path=path, line=line, column=MOONCAKE[0]) / 1000.0)
        ids = " ".join(map(str, found[HASH_IDS])) if isinstance(found.get(HASH_IDS), list) else None
        row = _row(
            texts,
            path=path,
            line=line,
            before_s=before_s,
            ids=None if ids is None else _ids(ids, path=path, line=line),
        )
        before_s = row.arrival_s
        yield row


def ids_beside(path: Path, *, num_rows: int) -> list[list[int]] | None:
    """Hash ids of NAME.hash_ids.txt or .txt.gz beside NAME.csv, line n for request n; None without such a file."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    names = (f"{stem}.{HASH_IDS}.txt", f"{stem}.{HASH_IDS}.txt.gz")
    beside = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if beside is None:
        return None
    lines = _text(beside).splitlines()
    if len(lines) != num_rows:
        what = f"{len(lines)} lines for {num_rows} requests of {path.name}"
        raise trace_error(beside, len(lines), HASH_IDS, what)
    return [_ids(text, path=beside, line=line) for line, text in enumerate(lines, start=1)]


def trace_error(path: Path, line: int, column: str, what: str) -> TraceError:
    """The one-line error."""
    return TraceError(f"{path}:{line}: {column}: {what}")


def _places(path: Path, header: list[str], columns: tuple[str, ...]) -> dict[str, int]:
    if not header or header == [""]:
        raise trace_error(path, 1, columns[0], f"the file is empty; expected a header with {', '.join(columns)}")
    for name in columns:
        if name not in header:
            raise trace_error(path, 1, name, f"the column is missing; the header has {_shown(', '.join(header))}")
    return {name: header.index(name) for name in columns}


def _moment_s(text: str, *, path: Path, line: int) -> float:
    """A moment such as 2023-11-16 18:17:03.9799600 as seconds; without a zone it is UTC."""
    found = _MOMENT.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        moment = datetime.fromisoformat(f"{found[1]} {found[2]}{(found[4] or 'Z').replace('Z', '+00:00')}")
        return moment.timestamp() + float(f"0{found[3] or '.0'}")
    except (ValueError, OverflowError):
        raise trace_error(path, line, AZURE[0], f"not a moment: {_shown(text)!r}") from None


def _row(
    texts: list[str], *, path: Path, line: int, before_s: float, ids: list[int] | None, group: str | None = None
) -> Row:
    arrival_s = _number(texts[0], path=path, line=line, column=COLUMNS[0])
    if arrival_s > MAX_ARRIVAL_S:
        raise trace_error(path, line, COLUMNS[0], f"must be at most {MAX_ARRIVAL_S:g}, got {arrival_s:g}")
    if arrival_s < before_s:
        what = f"arrivals must not decrease: {arrival_s:g} follows {before_s:g}"
        raise trace_error(path, line, COLUMNS[0], what)
    return Row(
        line=line,
        arrival_s=arrival_s,
        input_tokens=max(1, _tokens(texts[1], path=path, line=line, column=COLUMNS[1])),
        output_tokens=max(1, _tokens(texts[2], path=path, line=line, column=COLUMNS[2])),
        ids=ids,
        group=group,
    )


def _text(path: Path) -> str:
    """All of a file, unpacked where its name ends in .gz."""
    try:
        data = path.read_bytes()
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise trace_error(path, 1, COLUMNS[0], f"the file cannot be read: {reason}") from None


def _number(text: str, *, path: Path, line: int, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise trace_error(path, line, column, f"not a number: {_shown(text)!r}") from None
    if not math.isfinite(value):
        raise trace_error(path, line, column, f"must be finite, got {_shown(text)}")
    if value < 0:
        raise trace_error(path, line, column, f"must not be negative, got {_shown(text)}")
    return value


def _tokens(text: str, *, path: Path, line: int, column: str) -> int:
    value = _number(text, path=path, line=line, column=column)
    if value != int(value) or value > MAX_TOKENS:
        what = f"must be a whole number of tokens up to {MAX_TOKENS}, got {_shown(text)}"
        raise trace_error(path, line, column, what)
    return int(value)


def _ids(text: str, *, path: Path, line: int) -> list[int]:
    try:
        return list(map(int, text.split()))
    except ValueError:
        what = f"must be whole numbers with spaces between, got {_shown(text)!r}"
        raise trace_error(path, line, HASH_IDS, what) from None


def _shown(text: str) -> str:
    """A text of the file in an error, which is one line."""
    return " ".join(text.split())[:80]

"""Output of supervised processes: a terminal or pipe with prefixes, or one file for each process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from l4queue.cli.stack.disk import is_full

__all__ = ("ConsoleLog", "FileLog", "LineSplitter", "Log")

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)  # ANSI codes, one for each process in turn
_MAX_LINE_BYTES = 16_384  # a longer line is cut, so that a process cannot fill memory
_MAX_FILE_BYTES = 16_000_000
"""Of a log file. Chosen: weeks of decisions, and little beside the data of Redis."""


class Log(Protocol):
    """Takes whole lines of named processes. Never blocks its caller for long."""

    def write(self, name: str, line: str) -> None:
        """One line, without its end."""

    def path(self, name: str) -> Path | None:
        """The file with the lines of this process, if there is one."""

    def close(self) -> None:
        """Write what is left; safe to call twice."""


class LineSplitter:
    """Bytes in, lines out. Carriage returns of progress bars end a line; endless lines are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Lines completed by these bytes."""
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        while len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest[:_MAX_LINE_BYTES])
            self._rest = self._rest[_MAX_LINE_BYTES:]
        yield from (line.decode(errors="replace").rstrip() for line in lines if line.strip())

    def flush(self) -> Iterator[str]:
        """The last line when it had no end."""
        yield from self.feed(b"\n")


class ConsoleLog:
    """`worker-0   | line`, or a JSON object with `process`, written by a thread of its own.

    A terminal that is held (Ctrl-S) or a slow pipe must not stop the processes that log to it: at most
    `max_lines` wait, further ones are dropped and counted. `on_broken` is called from that thread, once, when
    the reader has gone.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        colour: bool | None = None,
        as_json: bool = False,
        max_lines: int = 10_000,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._colour = (self._stream.isatty() and "NO_COLOR" not in os.environ) if colour is None else colour
        self._as_json = as_json
        self._queue: queue.Queue[tuple[str, str] | None] = queue.Queue(maxsize=max_lines)
        self._num_dropped = 0
        self._width = 10
        self._colours: dict[str, int] = {}
        self._on_broken = on_broken
        self._thread = threading.Thread(target=self._drain, name="console-log", daemon=True)
        self._thread.start()

    def write(self, name: str, line: str) -> None:
        """Queue one line."""
        try:
            self._queue.put_nowait((name, line))
        except queue.Full:
            self._num_dropped += 1

    def path(self, name: str) -> Path | None:
        """None: a terminal keeps nothing."""
        return None

    def close(self) -> None:
        """Write what is queued, waiting at most two seconds for a reader that does not read."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=1.0)
            except queue.Full:
                return
            self._thread.join(timeout=2.0)

    def _drain(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                dropped, self._num_dropped = self._num_dropped, 0
                if dropped:
                    self._stream.write(self._format("l4queue", f"{dropped} lines dropped: the output is not read"))
                self._stream.write(self._format(*item))
                if self._queue.empty():
                    self._stream.flush()
            except (OSError, ValueError):
                if self._on_broken is not None:
                    self._on_broken()
                    self._on_broken = None

    def _format(self, name: str, line: str) -> str:
        if self._as_json:
            return _json_line(name, line)
        self._width = max(self._width, len(name))
        prefix = f"{name:<{self._width}} |"
        if self._colour:
            code = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
            prefix = f"\x1b[{code}m{prefix}\x1b[0m"
        return f"{prefix} {line}\n"


def _json_line(name: str, line: str) -> str:
    """A process's log line as JSON with its name; other lines, such as Redis's, become an object."""
    told: Any = None
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            told = json.loads(line)
    if not isinstance(told, dict):
        told = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "message": line}
    return json.dumps({"process": name, **told}) + "\n"


class FileLog:
    """One file for each process in a directory, begun anew; our own notes also go to `notes`.

    A file that has grown to `max_bytes` becomes NAME.log.1 in place of the one before it. A full disk loses lines,
    which is told once; it ends nothing.
    """

    def __init__(self, directory: Path, *, notes: TextIO | None = None, max_bytes: int = _MAX_FILE_BYTES) -> None:
        self.directory = directory
        self._notes = notes
        self._max_bytes = max_bytes
        self._has_told = False
        directory.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {}

    def write(self, name: str, line: str) -> None:
        """Append one line."""
        if name == "l4queue" and self._notes is not None:
            print(line, file=self._notes, flush=True)
        try:
            self._append(name, line)
        except OSError as error:
            if not is_full(error):
                raise
            if not self._has_told:
                self._has_told = True
                print(f"the disk of {self.directory} is full: log lines are lost", file=sys.stderr, flush=True)

    def path(self, name: str) -> Path | None:
        """The file of this process."""
        return self.directory / f"{name}.log"

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _append(self, name: str, line: str) -> None:
        path = self.directory / f"{name}.log"
        if name not in self._files:
            self._files[name] = path.open("wb", buffering=0)
        elif self._files[name].tell() >= self._max_bytes:
            self._files[name].close()
            path.replace(path.with_suffix(".log.1"))
            self._files[name] = path.open("wb", buffering=0)
        self._files[name].write(line.encode() + b"\n")

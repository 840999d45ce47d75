"""Log of `l4queue up`: every line into a file, and of these the decisions and the trouble onto the terminal."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from l4queue.cli.stack.logs import ConsoleLog, FileLog

__all__ = ("DecisionLog", "is_shown")

_HEADER = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) (?P<logger>\S+) ")
_OF_REDIS = re.compile(r"\d+:[A-Z] .{8,32} [#*] (?P<message>.*)")
_USUAL_OF_REDIS = re.compile(
    r"WARNING |oO0O|\w+ version=|Configuration loaded|Server initialized|Received SIG|User requested shutdown|"
    r".*ready to exit"
)
_LEVELS = logging.getLevelNamesMapping()
_QUIET = frozenset({"l4queue.metrics", "l4queue.moves", "l4queue.placement"})
"""Loggers with a line for each request or for each worker of a plan."""
_SERVICES = ("celery", "kombu", "flower")


class DecisionLog:
    """Files for all, the console for what `is_shown` chooses. With `verbose` the console has every line too."""

    def __init__(self, console: ConsoleLog, files: FileLog, *, verbose: bool = False) -> None:
        self._console = console
        self._files = files
        self._verbose = verbose

    def write(self, name: str, line: str) -> None:
        """One line of this process."""
        self._files.write(name, line)
        if self._verbose or is_shown(name, line):
            self._console.write(name, line)

    def path(self, name: str) -> Path | None:
        """The file with all lines of this process."""
        return self._files.path(name)

    def close(self) -> None:
        """Close both."""
        self._console.close()
        self._files.close()


def is_shown(name: str, line: str) -> bool:
    """Whether a line is for the terminal: our own notes, what l4queue decides, warnings of services, errors.

    Engines warn a hundred times at each start, so that only their errors count. A line without a level, such as
    those of a traceback, stays in the file: the supervisor shows the last lines of a process that ends.
    """
    if name == "l4queue":
        return True
    if name == "redis":
        found = _OF_REDIS.match(line)
        return found is not None and _USUAL_OF_REDIS.match(found["message"]) is None
    level, logger = _origin(line)
    if logger.startswith("l4queue"):
        return level >= (logging.WARNING if logger in _QUIET else logging.INFO)
    return level >= (logging.WARNING if logger.partition(".")[0] in _SERVICES else logging.ERROR)


def _origin(line: str) -> tuple[int, str]:
    """Level and logger of a line in either format; (0, "") of any other line."""
    found = _HEADER.match(line)
    if found is not None:
        return _LEVELS.get(found["level"], 0), found["logger"]
    if line.startswith("{"):
        try:
            told = json.loads(line)
            return _LEVELS.get(told["level"], 0), str(told["logger"])
        except (ValueError, KeyError, TypeError):
            return 0, ""
    return 0, ""

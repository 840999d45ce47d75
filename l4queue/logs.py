"""Log lines of every process: text with its fields as `name=value`, or one JSON object a line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from l4queue.protocol.trouble import Trouble, trouble_of

__all__ = (
    "BrokerOutage",
    "JsonFormatter",
    "TextFormatter",
    "formatter",
    "logs_json",
    "start_logging",
    "take_log_format",
)

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_ADDED_LATER = frozenset({"message", "asctime", "taskName", "color_message"})
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/@+-{}%()[],*#!?")
_REPEAT_S = 60.0  # one line a minute for each kind of message
_MOST_KINDS = 100  # of message, so that memory stays bounded
_BROKER_LOGGERS = ("celery.worker.consumer.consumer", "celery.beat")


class TextFormatter(logging.Formatter):
    """For people: time, level, logger, message, and the fields of our own records as `name=value`."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line before a traceback."""
        line = super().formatMessage(record)
        if not record.name.startswith("l4queue"):
            return line
        return " ".join([line, *(f"{name}={_word(value)}" for name, value in _fields(record).items())])


class JsonFormatter(logging.Formatter):
    """For programs: one object a line, with `time`, `level`, `logger`, `message`, fields, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told = {**_fields(record), **told}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


class BrokerOutage(logging.Filter):
    """Lets Celery say once a minute, in one line without a traceback, that its broker does not serve."""

    def __init__(self) -> None:
        super().__init__()
        self._said_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is logged."""
        if record.levelno < logging.WARNING:
            return True
        now_s, kind = time.monotonic(), str(record.msg)
        if now_s - self._said_s.get(kind, -_REPEAT_S) < _REPEAT_S:
            return False
        if len(self._said_s) >= _MOST_KINDS:
            self._said_s.clear()
        self._said_s[kind] = now_s
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and _is_of_broker(error):
            record.msg, record.args, record.exc_info = "%s", (str(error),), None
        return True


def formatter(log_format: str) -> logging.Formatter:
    """The one of this format: `text` or `json`."""
    return JsonFormatter() if log_format == "json" else TextFormatter()


def start_logging(log_format: str, *, level: int | str = logging.INFO) -> None:
    """Log to standard error in this format, from now on and whatever was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _BROKER_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, BrokerOutage) for known in logger.filters):
            logger.addFilter(BrokerOutage())


def logs_json() -> bool:
    """Whether this process logs as JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def take_log_format(arguments: Sequence[str]) -> list[str]:
    """Move `--log-format` from these arguments to the environment, where the settings find it; return the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--log-format")
    known, rest = parser.parse_known_args(list(arguments))
    if known.log_format is not None:
        os.environ["L4_LOG_FORMAT"] = known.log_format
    return rest


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The facts that a call gave as `extra`."""
    own = _record_names(logging.getLogRecordFactory())
    return {name: value for name, value in vars(record).items() if name not in own}


@lru_cache(maxsize=4)
def _record_names(factory: Callable[..., logging.LogRecord]) -> frozenset[str]:
    """Names that stand in every record of this factory; vLLM replaces Python's by one that adds a name."""
    return frozenset(vars(factory(None, None, "", 0, "", (), None, None))) | _ADDED_LATER


def _word(value: object) -> str:
    """A value without spaces, or quoted."""
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(text)


def _is_of_broker(error: BaseException) -> bool:
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        if isinstance(seen, Exception) and trouble_of(seen) not in (None, Trouble.PROTOCOL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False

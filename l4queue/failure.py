"""The end of a process by an error of ours: a line on standard error, and a code that says whether to retry."""

from __future__ import annotations

import sys

from l4queue.errors import ConfigError, L4QueueError

__all__ = ("ERROR_PREFIX", "EXIT_CONFIG", "EXIT_FAILED", "fail")

ERROR_PREFIX = "error: "
EXIT_FAILED = 1  # any other failure: another try may help
EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: a setting, the model or the machine is wrong. A new start would end the same way."""


def fail(error: L4QueueError) -> int:
    """Say it, and return the exit code."""
    print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
    return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED

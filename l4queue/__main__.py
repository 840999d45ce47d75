"""The command `l4queue`, also as `python -m l4queue`; an extra that is missing is named."""

from __future__ import annotations

import sys

__all__ = ("main",)

_EXTRAS = {
    "celery": "dispatcher",
    "flower": "dispatcher",
    "matplotlib": "plot",
    "numpy": "sim",
    "prometheus_client": "dispatcher",
    "psutil": "worker",
    "rich": "cli",
    "scipy": "fit",
    "transformers": "dispatcher",
    "typer": "cli",
}
"""Packages that the base install lacks, with the extra that brings each."""


def main() -> int:
    """Run one command; returns its exit code, 1 where a package is not installed."""
    try:
        from l4queue.cli import main as run_command

        return run_command()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        told = f"this command needs {package}, which is not installed: pip install 'l4queue[{_EXTRAS[package]}]'"
        print(f"error: {told}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Batches: a file of requests in, a file of answers out, resumable, at low priority. `batch.run` does the work."""

from __future__ import annotations

from collections.abc import Callable

from l4queue.client.batch.progress import BatchProgress, BatchSummary
from l4queue.errors import ConfigError

__all__ = ("BatchProgress", "BatchSummary", "load_run_batch")


def load_run_batch() -> Callable[..., BatchSummary]:
    """`run_batch` of `batch.run`, loaded when it is wanted: it alone of the client needs numpy."""
    try:
        from l4queue.client.batch.run import run_batch
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise ConfigError("a batch needs numpy: pip install 'l4queue[batch]'") from None
    return run_batch

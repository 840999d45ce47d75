"""Batches: a file of requests in, a file of answers out, resumable, at low priority. `batch.run` does the work."""

from l4queue.client.batch.options import BatchOptions, batch_options
from l4queue.client.batch.progress import BatchProgress, BatchSummary

__all__ = ("BatchOptions", "BatchProgress", "BatchSummary", "batch_options")

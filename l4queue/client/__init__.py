"""Clients: enqueue requests, read results, stream tokens.

Imports `protocol`, `observe` and everything below them; the commands use it. Begin with `core.py` (no I/O), then
`sync.py` or `aio.py`; `demux.py` and `listener.py` wait for many requests at once.
"""

from l4queue.client.aio import AsyncClient, AsyncHandle
from l4queue.client.batch import BatchProgress, BatchSummary
from l4queue.client.core import Chunk, Result
from l4queue.client.options import EnqueueOptions, RequestFields, SamplingOptions
from l4queue.client.status import RequestStatus
from l4queue.client.sync import Client, Handle
from l4queue.protocol.records import CachedPrompt, TokenLogprobs

__all__ = (
    "AsyncClient",
    "AsyncHandle",
    "BatchProgress",
    "BatchSummary",
    "CachedPrompt",
    "Chunk",
    "Client",
    "EnqueueOptions",
    "Handle",
    "RequestFields",
    "RequestStatus",
    "Result",
    "SamplingOptions",
    "TokenLogprobs",
)

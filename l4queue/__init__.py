"""l4queue: length-aware serving of large language models for people who work with queues.

Packages from the top: `cli`, `client` and `sim`, `observe`, `protocol` and `planning`, `policy`, `cost`. Begin
with docs/architecture.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4queue.client import (
        AsyncClient,
        AsyncHandle,
        BatchProgress,
        BatchSummary,
        CachedPrompt,
        Chunk,
        Client,
        EnqueueOptions,
        Handle,
        RequestFields,
        RequestStatus,
        Result,
        SamplingOptions,
        TokenLogprobs,
    )
    from l4queue.config import Settings
    from l4queue.errors import (
        ConfigError,
        IdempotencyConflict,
        InvalidRequest,
        L4QueueError,
        OutputLost,
        QueueFull,
        RequestCancelled,
        RequestDead,
        RequestExpired,
        RequestFailed,
        RequestNotDone,
        RequestTooLong,
        ResultExpired,
        ResultTimeout,
        ServiceUnavailable,
        TraceError,
        UnknownRequest,
        UnreadableValue,
    )
    from l4queue.models import ChatMessage, RequestSpec, RequestState
    from l4queue.sampling import SamplingParams, StructuredOutputs

__all__ = (
    "AsyncClient",
    "AsyncHandle",
    "BatchProgress",
    "BatchSummary",
    "CachedPrompt",
    "ChatMessage",
    "Chunk",
    "Client",
    "ConfigError",
    "EnqueueOptions",
    "Handle",
    "IdempotencyConflict",
    "InvalidRequest",
    "L4QueueError",
    "OutputLost",
    "QueueFull",
    "RequestCancelled",
    "RequestDead",
    "RequestExpired",
    "RequestFailed",
    "RequestFields",
    "RequestNotDone",
    "RequestSpec",
    "RequestState",
    "RequestStatus",
    "RequestTooLong",
    "Result",
    "ResultExpired",
    "ResultTimeout",
    "SamplingOptions",
    "SamplingParams",
    "ServiceUnavailable",
    "Settings",
    "StructuredOutputs",
    "TokenLogprobs",
    "TraceError",
    "UnknownRequest",
    "UnreadableValue",
)

_HOMES = {
    "l4queue.client": (
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
    ),
    "l4queue.config": ("Settings",),
    "l4queue.errors": (
        "ConfigError",
        "IdempotencyConflict",
        "InvalidRequest",
        "L4QueueError",
        "OutputLost",
        "QueueFull",
        "RequestCancelled",
        "RequestDead",
        "RequestExpired",
        "RequestFailed",
        "RequestNotDone",
        "RequestTooLong",
        "ResultExpired",
        "ResultTimeout",
        "ServiceUnavailable",
        "TraceError",
        "UnknownRequest",
        "UnreadableValue",
    ),
    "l4queue.models": (
        "ChatMessage",
        "RequestSpec",
        "RequestState",
    ),
    "l4queue.sampling": (
        "SamplingParams",
        "StructuredOutputs",
    ),
}

_INNER = {"Any", "TYPE_CHECKING", "annotations", "_HOMES", "_INNER"}


def __getattr__(name: str) -> Any:
    """Load on first use: the simulator and the CLI start without a Redis client."""
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'l4queue' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names too that are not loaded yet, for completion in a shell or a notebook."""
    return sorted({*__all__, *(name for name in globals() if name not in _INNER)})

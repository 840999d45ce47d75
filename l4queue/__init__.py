"""l4queue: length-aware serving of large language models for people who work with queues.

Packages from the top: `cli`, `client` and `sim`, `observe`, `protocol` and `planning`, `policy`, `cost`. Begin
with docs/architecture.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4queue.client import AsyncClient, AsyncHandle, Chunk, Client, Handle, Result
    from l4queue.config import Settings
    from l4queue.models import RequestSpec, RequestState, SamplingParams

__all__ = (
    "AsyncClient",
    "AsyncHandle",
    "Chunk",
    "Client",
    "Handle",
    "RequestSpec",
    "RequestState",
    "Result",
    "SamplingParams",
    "Settings",
)

_HOMES = {
    "l4queue.client": ("AsyncClient", "AsyncHandle", "Chunk", "Client", "Handle", "Result"),
    "l4queue.config": ("Settings",),
    "l4queue.models": ("RequestSpec", "RequestState", "SamplingParams"),
}


def __getattr__(name: str) -> Any:
    """Load on first use: the simulator and the CLI start without a Redis client."""
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'l4queue' has no attribute {name!r}")

"""Files and batches as a part of a gateway's application: routes, catalogue and runner of one store."""

from __future__ import annotations

from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry

from gateway.batches.catalogue import Catalogue
from gateway.batches.metrics import BatchMetrics
from gateway.batches.routes import build_routes
from gateway.batches.runner import BatchRunner
from gateway.batches.store import FileStore
from gateway.keys import ApiKeys
from l4queue.client.batch.halves import Halves
from l4queue.config import Settings
from l4queue.protocol.executor import AsyncExecutor

__all__ = ("BatchService", "open_store")


def open_store(settings: Settings) -> FileStore | None:
    """The store of files; None where none are served. ConfigError where it cannot be used."""
    if not settings.http_files:
        return None
    store = FileStore(settings.http_files)
    store.check()
    return store


class BatchService:
    """Serves from when it is made, in the running event loop, until `close`.

    A batch is bound by the limits of its owner among `keys`. `halves` writes the requests that a batch cannot
    write by itself; without it these are refused.
    """

    def __init__(
        self,
        settings: Settings,
        store: FileStore,
        app: FastAPI,
        *,
        keys: ApiKeys,
        halves: Halves | None = None,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._executor = AsyncExecutor(settings.redis_url, retry_s=0.0)
        self._runner = BatchRunner(
            settings, store, self._executor, BatchMetrics(registry), halves=halves, api_keys=keys
        )
        catalogue = Catalogue(settings, store, self._executor, begun=self._runner.wake)
        app.include_router(build_routes(catalogue, max_file_bytes=settings.http_file_max_bytes))
        self._runner.start()

    async def close(self) -> None:
        """Leave the batches to other gateways."""
        await self._runner.close()
        await self._executor.close()

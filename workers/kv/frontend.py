"""The front end of KV hand-over: tickets, waits for a copy, counters. Knows no vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4queue.hardware import memory_text
from workers.kv.budget import needed_bytes
from workers.kv.directory_lock import DirectoryLock, enter
from workers.kv.store import SegmentStore, new_ticket

__all__ = ("KVFrontend", "model_fingerprint")

log = logging.getLogger("l4queue.kv")
_CUT_TIMEOUT_S = 5.0  # for the copy of a cut request; a second prefill is cheaper then
_LOOK_S = 0.003  # between two looks for the copy's file: well under one step
_SWEEP_EVERY_S = 10.0  # between two searches for old files
_SAMPLE_BYTES = 1 << 16  # read at each of eight places of a file of weights
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


class KVFrontend:
    """Tickets of one engine's requests. Each gets one when it is admitted, in case it is cut.

    Changed on one event loop only, `take` included.
    """

    def __init__(self, store: SegmentStore) -> None:
        self._store = store
        self._tenancy: DirectoryLock | None = None
        self._tickets: dict[str, str] = {}
        self._started: set[str] = set()
        self._waiting: dict[str, asyncio.Future[bool]] = {}
        self._swept_s = 0.0
        self._declared_fd = -1
        self.budget_bytes = store.budget_bytes()  # most bytes of segments of all engines of the host
        self.num_loads = 0
        self.num_misses = 0
        self.loaded_bytes = 0
        self.bytes_per_s = 0.0  # of a move, out and in, as last measured; 0: not yet

    def room_bytes(self) -> int:
        """Room that segments leave; 0 where the directory cannot be read."""
        try:
            return self._store.room_bytes()
        except OSError as error:
            log.warning("%s cannot be read: %s", self._store.directory, error)
            return 0

    def open(self) -> None:
        """Use the directory from now on; what engines that were killed have left there goes."""
        try:
            self._tenancy = enter(self._store.directory)
        except OSError as error:
            log.warning("KV that killed engines have left in %s stays there: %s", self._store.directory, error)

    def declare(self, *, longest_tokens: int, kv_bytes_per_token: int) -> None:
        """The engine runs: its moves count in the budget of the host, unless that is set."""
        try:
            if self._store.limit_bytes is None:
                needed = needed_bytes(longest_tokens=longest_tokens, kv_bytes_per_token=kv_bytes_per_token)
                self._declared_fd = self._store.declare(needed)
            self.budget_bytes = self._store.budget_bytes()
        except OSError as error:
            log.warning("%s cannot be used: %s", self._store.directory, error)
        log.info(
            "KV caches of moving requests: room for %s on this host, %s tokens in all; longest request %s",
            memory_text(self.budget_bytes),
            f"{self.budget_bytes // kv_bytes_per_token:,}",
            f"{longest_tokens:,}",
        )

    def close(self) -> None:
        """The engine is gone: so is the directory, when no other uses it."""
        if self._declared_fd >= 0:
            os.close(self._declared_fd)
            self._declared_fd = -1
        try:
            if self._tenancy is not None:
                self._tenancy.leave()
        except OSError as error:
            log.warning("KV stays in %s: %s", self._store.directory, error)

    def connector_config(self, fingerprint: str) -> dict[str, Any]:
        """Arguments of vLLM's `KVTransferConfig` for the connector in the engine's processes."""
        return {
            "kv_connector": "HandoverConnector",
            "kv_connector_module_path": "workers.kv.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "directory": str(self._store.directory),
                "limit_bytes": self._store.limit_bytes,
                "ttl_s": self._store.ttl_s,
                "fingerprint": fingerprint,
            },
        }

    def admit(self, request_id: str, ticket: str) -> dict[str, str]:
        """Facts of a request for the connector: its own ticket, and the ticket that it comes with."""
        own = self._tickets[request_id] = new_ticket()
        return {"l4_own": own} | ({"l4_from": ticket} if ticket else {})

    def started(self, request_id: str) -> None:
        """A token has come out: only from then on is it sure that the connector hears of its end."""
        self._started.add(request_id)

    def left(self, request_id: str) -> None:
        """The request is no longer in the engine."""
        self._started.discard(request_id)
        self._tickets.pop(request_id, None)

    def begin_cut(self, request_id: str) -> str:
        """Mark a request, so that the connector keeps its blocks when it is aborted next; its ticket or ""."""
        ticket = self._tickets.get(request_id, "") if request_id in self._started else ""
        if ticket:
            try:
                self._store.mark(ticket)
            except OSError as error:
                log.warning("KV of %s is not kept: %s", request_id, error)
                return ""
            self._waiting[ticket] = asyncio.get_running_loop().create_future()
        return ticket

    async def finish_cut(self, ticket: str) -> str:
        """Wait for the copy; the ticket, or "" when there is none: refused, failed, or too slow.

        The copy is there with its file. The engine tells of it with the next output, and while it computes a long
        prompt there is none.
        """
        told, path = self._waiting[ticket], self._store.path(ticket)
        try:
            async with asyncio.timeout(_CUT_TIMEOUT_S):
                while not path.exists():
                    await asyncio.wait({told}, timeout=_LOOK_S)
                    if told.done():
                        return ticket if told.result() else ""
                return ticket
        except TimeoutError:
            log.warning("no KV of a cut request after %g s", _CUT_TIMEOUT_S)
            return ""
        finally:
            del self._waiting[ticket]
            self._store.take_mark(ticket)

    def take(self, transfers: Mapping[str, Any]) -> None:
        """Take in the connector's report of a step (`workers.kv.scheduler.TransferLog`)."""
        for tickets, is_kept in ((transfers["kept"], True), (transfers["dropped"], False)):
            for ticket in tickets:
                future = self._waiting.get(ticket)
                if future is not None and not future.done():
                    future.set_result(is_kept)
        self.num_loads += transfers["num_loads"]
        self.num_misses += sum(transfers["misses"].values())
        self.loaded_bytes += transfers["loaded_bytes"]
        self.bytes_per_s = transfers["bytes_per_s"] or self.bytes_per_s

    def engine_died(self) -> None:
        """Nobody will copy any more."""
        for future in self._waiting.values():
            if not future.done():
                future.set_result(False)

    def sweep(self, now_s: float) -> None:
        """Now and then, remove old segments and those of dead writers."""
        if now_s - self._swept_s >= _SWEEP_EVERY_S:
            self._swept_s = now_s
            try:
                self._store.sweep()
                self.budget_bytes = self._store.budget_bytes()
            except OSError as error:  # removed by somebody: cuts go without KV, everything else goes on
                log.warning("%s cannot be swept: %s", self._store.directory, error)


def model_fingerprint(model: str, *facts: object) -> str:
    """Tells weights apart whose KV must not be mixed: name or files (size, and a sample of each), and the facts.

    The path of a local model does not count, so that copies of it may exchange their KV.
    """
    digest = hashlib.blake2b(json.dumps([str(fact) for fact in facts]).encode(), digest_size=16)
    folder = Path(model)
    if not folder.is_dir():
        digest.update(model.encode())
        return digest.hexdigest()
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for path in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(8):
                file.seek(part * size // 8)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()

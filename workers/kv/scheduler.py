"""The scheduler's side of KV hand-over: saves, loads and their outcome. Knows no vLLM."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workers.kv.copier import LoadJob, SaveJob
from workers.kv.segment import Layout, MissCause, Segment, SegmentError
from workers.kv.store import SegmentStore, is_ticket

__all__ = ("KVRequest", "KVScheduler", "TransferLog")

log = logging.getLogger("l4queue.kv")


@dataclass(slots=True, kw_only=True)
class TransferLog:
    """Transfers since it was last taken. `kept` and `dropped` are tickets of cut requests."""

    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    num_loads: int = 0
    loaded_bytes: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    bytes_per_s: float = 0.0  # of a move, as last measured; 0: as before

    def __bool__(self) -> bool:
        return bool(self.kept or self.dropped or self.num_loads or self.misses or self.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRequest:
    """A request that is to be admitted. `cached_tokens` are in the engine's cache already, in whole blocks."""

    request_id: str
    ticket: str
    token_ids: Sequence[int]
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    """The part of a segment that a request can use."""

    num_tokens: int
    layout: Layout


class KVScheduler:
    """Decides for one engine. Every request with a ticket either loads or misses, once."""

    def __init__(self, store: SegmentStore, *, fingerprint: str, block_tokens: int) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._block_tokens = block_tokens
        self._matches: dict[str, _Match] = {}
        self._cached: dict[str, int] = {}  # tokens in the engine's cache when it was last asked
        self._loading: dict[str, int] = {}  # bytes
        self._abandoned: set[str] = set()  # gone while they were loading
        self._settled: set[str] = set()
        self._saving: dict[str, str] = {}
        self._jobs: list[SaveJob | LoadJob] = []
        self._transfers = TransferLog()
        self._said: set[MissCause] = set()

    def loadable_tokens(self, arrival: KVRequest) -> int:
        """Tokens that can be loaded beyond the cached ones; never the last token. May be asked again and again."""
        request_id, ticket = arrival.request_id, arrival.ticket
        if not ticket or request_id in self._settled or request_id in self._loading:
            return 0
        match = self._matches.get(request_id)
        if match is None:
            try:
                match = self._matches[request_id] = self._look(ticket, arrival.token_ids)
            except SegmentError as error:
                self._missed(request_id, error.cause, str(error))
                if error.cause in (MissCause.DAMAGED, MissCause.FOREIGN) and is_ticket(ticket):
                    self._store.remove(ticket)
                return 0
        self._cached[request_id] = arrival.cached_tokens
        num_tokens = min(match.num_tokens, len(arrival.token_ids) - 1) - arrival.cached_tokens
        if num_tokens > 0:
            return num_tokens
        self._settled.add(request_id)  # the engine has it all: as good as loaded
        self._store.remove(ticket)
        self._transfers.num_loads += 1
        return 0

    def load(self, request_id: str, ticket: str, *, num_tokens: int, block_ids: Sequence[int]) -> None:
        """The engine has room: fill its blocks with this number of tokens beyond the cached ones."""
        cached_tokens = self._cached[request_id]
        first_block = cached_tokens // self._block_tokens
        last_block = -(-(cached_tokens + num_tokens) // self._block_tokens)
        layout = self._matches[request_id].layout
        self._loading[request_id] = (last_block - first_block) * layout.block_bytes * layout.num_layers
        job = LoadJob(
            request_id=request_id,
            ticket=ticket,
            first_block=first_block,
            block_ids=list(block_ids[first_block:last_block]),
        )
        self._jobs.append(job)

    def left(
        self, request_id: str, ticket: str, *, token_ids: Sequence[int], block_ids: Sequence[int], is_cut: bool
    ) -> bool:
        """A request leaves the engine, computed as far as `token_ids`. True: its blocks must stay for a while."""
        is_loading = request_id in self._loading
        if is_loading:
            self._abandoned.add(request_id)
        self._matches.pop(request_id, None)
        self._cached.pop(request_id, None)
        self._settled.discard(request_id)
        if not ticket or not self._store.take_mark(ticket):
            return False
        num_blocks = -(-len(token_ids) // self._block_tokens)
        if not is_cut or is_loading or not token_ids or len(block_ids) < num_blocks:
            self._transfers.dropped.append(ticket)
            return False
        self._saving[request_id] = ticket
        self._jobs.append(
            SaveJob(
                request_id=request_id,
                ticket=ticket,
                token_ids=list(token_ids),
                block_ids=list(block_ids[:num_blocks]),
            )
        )
        return True

    def take_jobs(self) -> list[SaveJob | LoadJob]:
        """Jobs for the carrier since the last call, in order."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def over(self, *, saved: Iterable[str], loaded: Iterable[str], failed: Iterable[str]) -> None:
        """Take in the carrier's report."""
        for request_id in saved:
            ticket = self._saving.pop(request_id)
            is_kept = self._store.path(ticket).exists()
            (self._transfers.kept if is_kept else self._transfers.dropped).append(ticket)
        failures = set(failed)
        for request_id in {*loaded, *failures}:
            num_bytes = self._loading.pop(request_id)
            if request_id in self._abandoned:
                self._abandoned.remove(request_id)
            elif request_id in failures:
                self._missed(request_id, MissCause.DAMAGED, "could not be read to its end")
            else:
                self._settled.add(request_id)
                self._transfers.num_loads += 1
                self._transfers.loaded_bytes += num_bytes

    def measured(self, bytes_per_s: float) -> None:
        """Take in the carrier's speed."""
        self._transfers.bytes_per_s = bytes_per_s

    def take_log(self) -> TransferLog:
        """Transfers since the last call."""
        log, self._transfers = self._transfers, TransferLog()
        return log

    def _look(self, ticket: str, token_ids: Sequence[int]) -> _Match:
        if not is_ticket(ticket):
            raise SegmentError(MissCause.MISSING, "not a ticket of this kind of engine")
        with Segment(self._store.path(ticket)) as segment:
            layout = segment.layout
            if (layout.fingerprint, layout.block_tokens) != (self._fingerprint, self._block_tokens):
                raise SegmentError(MissCause.FOREIGN, f"{ticket}: of another model, data type or version")
            num_tokens = segment.common_tokens(token_ids)
        if not num_tokens:
            raise SegmentError(MissCause.MISMATCH, f"{ticket}: of another request")
        return _Match(num_tokens=num_tokens, layout=layout)

    def _missed(self, request_id: str, cause: MissCause, why: str) -> None:
        self._settled.add(request_id)
        self._transfers.misses[cause] = self._transfers.misses.get(cause, 0) + 1
        if cause not in self._said:
            self._said.add(cause)
            log.warning("KV of %s is prefilled (%s, said once): %s", request_id, cause, why)

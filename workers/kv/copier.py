"""Copies of KV between an engine's cache and segments, on a thread beside the engine's steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workers.kv.blocks import BlockRows
from workers.kv.segment import Layout, MissCause, Segment, SegmentError, SegmentPiece, SegmentWriter
from workers.kv.speed import CopySpeed
from workers.kv.store import SegmentStore, new_ticket

__all__ = ("KVCopier", "LoadJob", "Results", "SaveJob")

log = logging.getLogger("l4queue.kv")
_MEASURED_BYTES = 32 << 20
"""KV copied to know the speed before the first move. Chosen: 11 ms each way at the 3 GB/s of an H100's cache, and
under 0.1 s on two cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """Write the blocks of a request that was cut. Its blocks stay as they are until this is reported."""

    request_id: str
    ticket: str
    token_ids: Sequence[int]
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """Fill `block_ids` with the segment's blocks from `first_block` on."""

    request_id: str
    ticket: str
    first_block: int
    block_ids: Sequence[int]


@dataclass(slots=True, kw_only=True)
class Results:
    """Requests whose job is over since the last look. Failed loads are among the loaded too."""

    saved: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)


class KVCopier:
    """One thread that works off jobs in order. A job that fails is reported like one that succeeds.

    Where the cache is a GPU's, several threads share the pieces of a job: each copies, sums up or writes, and a
    single one takes several times as long as computing the KV again. Whether a segment was written is seen from
    its file; a failed load is in `Results.failed`.
    """

    def __init__(self, store: SegmentStore, rows: BlockRows, *, fingerprint: str, block_tokens: int) -> None:
        self._store = store
        self._rows = rows
        self._fingerprint = fingerprint
        self._block_tokens = block_tokens
        self._jobs: queue.SimpleQueue[tuple[SaveJob | LoadJob, Any] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._results = Results()
        self._num_pending = 0
        self._said: set[str] = set()
        self._speed = CopySpeed()
        self._told_bytes_per_s = 0.0
        many = rows.num_threads > 1
        self._pool = ThreadPoolExecutor(rows.num_threads, thread_name_prefix="kv-carrier") if many else None
        self._thread = threading.Thread(target=self._work, name="kv-carrier", daemon=True)
        self._thread.start()

    def submit(self, job: SaveJob | LoadJob) -> None:
        """Queue a job. What the engine computes before it comes first."""
        with self._changed:
            self._num_pending += 1
        self._jobs.put((job, self._rows.begin()))

    def measure(self) -> None:
        """Copy some blocks out and into their places again, while nobody uses the cache."""
        block_bytes = self._rows.num_layers * self._rows.block_bytes
        try:
            num_bytes = min(_MEASURED_BYTES, self._store.room_bytes() // 2)
            most = max(1, min(self._rows.num_blocks, num_bytes // block_bytes))
            for num_blocks in (1, most):  # the first copy of all pays for what is made once
                self._speed = CopySpeed()
                ticket, blocks = new_ticket(), range(num_blocks)
                ids = [0] * (num_blocks * self._block_tokens)
                self._save(SaveJob(request_id="", ticket=ticket, token_ids=ids, block_ids=blocks))
                self._load(LoadJob(request_id="", ticket=ticket, first_block=0, block_ids=blocks))
        except (OSError, SegmentError) as error:
            log.warning("the speed of KV copies is not known before the first move: %s", error)

    def new_bytes_per_s(self) -> float:
        """Speed of a move as measured here, if that has changed since the last call; else 0."""
        found, told = self._speed.bytes_per_s, self._told_bytes_per_s
        self._told_bytes_per_s = found
        return found if found != told else 0.0

    def results(self, *, wait_s: float) -> Results:
        """Transfers that are over; waits up to this time for one, if any is under way."""
        with self._changed:
            if self._num_pending and not (self._results.saved or self._results.loaded):
                self._changed.wait(wait_s)
            results, self._results = self._results, Results()
            return results

    def close(self) -> None:
        """End the thread after the jobs that it has."""
        self._jobs.put(None)
        self._thread.join(timeout=5.0)
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, begun = entry
            is_done = False
            try:
                self._rows.after(begun)
                self._save(job) if isinstance(job, SaveJob) else self._load(job)
                is_done = True
            except (OSError, SegmentError) as error:
                self._say_once(job, error)
            except Exception:  # the engine waits for every job's end, and prefills what was not loaded
                log.exception("KV of %s: not moved", job.request_id)
            self._report(job, is_done=is_done)

    def _report(self, job: SaveJob | LoadJob, *, is_done: bool) -> None:
        with self._changed:
            self._num_pending -= 1
            if isinstance(job, SaveJob):
                self._results.saved.add(job.request_id)
            else:
                self._results.loaded.add(job.request_id)
                if not is_done:
                    self._results.failed.add(job.request_id)
            self._changed.notify_all()

    def _save(self, job: SaveJob) -> None:
        layout, begun_s = self._layout(len(job.token_ids)), time.perf_counter()
        part = self._store.create(job.ticket, layout.total_bytes)
        if part is None:
            raise OSError(f"no room for {layout.total_bytes} bytes within {self._store.budget_bytes()}")
        try:
            writer = SegmentWriter(part.fd, layout, job.token_ids)

            def save(piece: SegmentPiece) -> None:
                blocks = job.block_ids[piece.first_block : piece.first_block + piece.num_blocks]
                writer.write(piece, self._rows.gather(piece.layer, blocks))

            self._each(layout.pieces(), save)
            writer.seal()
        except BaseException:
            self._store.discard(part)
            raise
        self._store.publish(part)
        self._speed.copied_out(layout.payload_bytes, time.perf_counter() - begun_s)

    def _load(self, job: LoadJob) -> None:
        """Read what covers the blocks, put it there, use the segment up. When it fails, blocks are half filled."""
        last_block, begun_s = job.first_block + len(job.block_ids), time.perf_counter()
        try:
            with Segment(self._store.path(job.ticket)) as segment:
                layout = segment.layout
                if not layout.fits(self._layout(layout.num_tokens)) or layout.num_blocks < last_block:
                    raise SegmentError(MissCause.FOREIGN, f"{job.ticket}: another model or layout")

                def load(piece: SegmentPiece) -> None:
                    scratch = np.empty((piece.num_blocks, layout.block_bytes), dtype=np.uint8)
                    rows = segment.read(piece, scratch)
                    skipped = max(0, job.first_block - piece.first_block)
                    at = piece.first_block + skipped - job.first_block
                    targets = job.block_ids[at : at + piece.num_blocks - skipped]
                    self._rows.scatter(piece.layer, targets, rows[skipped : skipped + len(targets)])

                self._each(layout.pieces(from_block=job.first_block, until_block=last_block), load)
                self._rows.finish()
            num_bytes = len(job.block_ids) * layout.num_layers * layout.block_bytes
            self._speed.copied_in(num_bytes, time.perf_counter() - begun_s)
        finally:
            self._store.remove(job.ticket)

    def _each(self, pieces: Sequence[SegmentPiece], work: Callable[[SegmentPiece], None]) -> None:
        """Do it for all pieces. When one fails, the others are over too before its error is raised."""
        if self._pool is None:
            for piece in pieces:
                work(piece)
            return
        jobs = [self._pool.submit(work, piece) for piece in pieces]
        wait(jobs)
        for job in jobs:
            job.result()

    def _layout(self, num_tokens: int) -> Layout:
        return Layout(
            fingerprint=self._fingerprint,
            num_layers=self._rows.num_layers,
            block_tokens=self._block_tokens,
            block_bytes=self._rows.block_bytes,
            num_tokens=num_tokens,
        )

    def _say_once(self, job: SaveJob | LoadJob, error: OSError | SegmentError) -> None:
        cause = error.cause if isinstance(error, SegmentError) else type(error).__name__
        what = "saved" if isinstance(job, SaveJob) else "loaded"
        if f"{what} {cause}" not in self._said:
            self._said.add(f"{what} {cause}")
            log.warning("KV of %s not %s, it will be prefilled (said once): %s", job.request_id, what, error)

"""The scheduler's decisions: who loads how much, who is saved, what is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from workers.kv.copier import LoadJob, SaveJob
from workers.kv.scheduler import KVRequest, KVScheduler
from workers.kv.segment import Layout, SegmentWriter
from workers.kv.store import SegmentStore, new_ticket

BLOCK_TOKENS = 16


@pytest.fixture
def store(tmp_path: Path) -> SegmentStore:
    """An empty directory."""
    return SegmentStore(tmp_path / "kv", limit_bytes=1 << 24)


@pytest.fixture
def planning(store: SegmentStore) -> KVScheduler:
    """Of an engine."""
    return KVScheduler(store, fingerprint="model", block_tokens=BLOCK_TOKENS)


@pytest.fixture
def segment(store: SegmentStore) -> Callable[..., str]:
    """Writes segments of ids 0, 1, 2, ...; their tickets."""

    def make(num_tokens: int, *, fingerprint: str = "model", block_tokens: int = BLOCK_TOKENS) -> str:
        layout = Layout(
            fingerprint=fingerprint,
            num_layers=2,
            block_tokens=block_tokens,
            block_bytes=100,
            num_tokens=num_tokens,
        )
        part = store.create(new_ticket(), layout.total_bytes)
        assert part is not None
        writer = SegmentWriter(part.fd, layout, range(num_tokens))
        for piece in layout.pieces():
            writer.write(piece, np.zeros((piece.num_blocks, 100), dtype=np.uint8))
        writer.seal()
        store.publish(part)
        return part.ticket

    return make


def arrival(ticket: str, num_tokens: int, *, cached_tokens: int = 0, name: str = "r") -> KVRequest:
    """A request of ids 0, 1, 2, ..."""
    return KVRequest(
        request_id=name, ticket=ticket, token_ids=list(range(num_tokens)), cached_tokens=cached_tokens
    )


@pytest.mark.parametrize(
    ("saved", "given", "cached", "loadable"),
    [
        (100, 101, 0, 100),  # the usual hand-over: all but the last token
        (100, 100, 0, 99),  # the engine was further than what was committed
        (100, 60, 0, 59),
        (100, 150, 0, 100),  # the engine was not as far
        (100, 101, 32, 68),  # the target has two blocks already
        (100, 101, 96, 4),
    ],
)
def test_as_many_tokens_as_match_but_the_last(
    planning: KVScheduler, segment: Callable[..., str], saved: int, given: int, cached: int, loadable: int
) -> None:
    """And only blocks that are not there yet are filled, each time the scheduler asks the same."""
    ticket = segment(saved)
    asked = arrival(ticket, given, cached_tokens=cached)
    assert [planning.loadable_tokens(asked) for _ in range(3)] == [loadable] * 3

    blocks = list(range(1000, 1000 + -(-given // BLOCK_TOKENS)))
    planning.load("r", ticket, num_tokens=loadable, block_ids=blocks)
    (job,) = planning.take_jobs()
    first, last = cached // BLOCK_TOKENS, -(-(cached + loadable) // BLOCK_TOKENS)
    assert job == LoadJob(request_id="r", ticket=ticket, first_block=first, block_ids=blocks[first:last])
    planning.over(saved=(), loaded={"r"}, failed=())
    ledger = planning.take_log()
    assert (ledger.num_loads, ledger.loaded_bytes, ledger.misses) == (1, (last - first) * 2 * 100, {})
    assert planning.loadable_tokens(asked) == 0
    assert not planning.take_log()


def test_what_the_target_has_already_is_not_loaded(
    planning: KVScheduler, store: SegmentStore, segment: Callable[..., str]
) -> None:
    """A request that comes back; its segment goes."""
    ticket = segment(100)
    assert planning.loadable_tokens(arrival(ticket, 101, cached_tokens=112)) == 0
    assert not store.path(ticket).exists()
    assert planning.take_log().num_loads == 1


def test_misses_are_counted_once_each_by_cause(planning: KVScheduler, segment: Callable[..., str]) -> None:
    """However often the scheduler asks."""
    damaged = segment(50)
    path = planning._store.path(damaged)
    path.write_bytes(path.read_bytes()[:-1])
    tickets = {
        "missing": new_ticket(),
        "no ticket": "../../../etc/passwd",
        "foreign": segment(50, fingerprint="other"),
        "blocks": segment(50, block_tokens=32),
        "damaged": damaged,
    }
    for name, ticket in tickets.items():
        for _ in range(3):
            assert planning.loadable_tokens(arrival(ticket, 60, name=name)) == 0
    other = KVRequest(request_id="m", ticket=segment(50), token_ids=[9, *range(1, 60)], cached_tokens=0)
    assert planning.loadable_tokens(other) == 0
    assert planning.loadable_tokens(arrival("", 60, name="without")) == 0
    assert planning.take_log().misses == {"missing": 2, "foreign": 2, "damaged": 1, "mismatch": 1}


def test_a_failed_load_is_a_miss_and_not_tried_again(planning: KVScheduler, segment: Callable[..., str]) -> None:
    """The scheduler asks once more and then prefills."""
    ticket = segment(100)
    asked = arrival(ticket, 101)
    planning.load("r", ticket, num_tokens=planning.loadable_tokens(asked), block_ids=list(range(7)))
    planning.over(saved=(), loaded={"r"}, failed={"r"})
    assert planning.loadable_tokens(asked) == 0
    assert planning.take_log().misses == {"damaged": 1}


def leave(
    planning: KVScheduler, ticket: str, num_tokens: int = 40, *, is_cut: bool = True, name: str = "r"
) -> bool:
    """A request leaves with so many computed tokens."""
    blocks = list(range(-(-num_tokens // BLOCK_TOKENS)))
    return planning.left(name, ticket, token_ids=list(range(num_tokens)), block_ids=blocks, is_cut=is_cut)


def test_only_a_marked_request_is_saved(planning: KVScheduler, store: SegmentStore) -> None:
    """Ends and cancellations cost one look at the directory."""
    ticket = new_ticket()
    assert not leave(planning, ticket)
    assert not leave(planning, "")
    assert planning.take_jobs() == []

    store.mark(ticket)
    assert leave(planning, ticket)
    job = SaveJob(request_id="r", ticket=ticket, token_ids=list(range(40)), block_ids=[0, 1, 2])
    assert planning.take_jobs() == [job]
    assert not leave(planning, ticket)


@pytest.mark.parametrize("is_written", [True, False])
def test_the_front_end_hears_what_became_of_a_copy(
    planning: KVScheduler, store: SegmentStore, segment: Callable[..., str], is_written: bool
) -> None:
    """By whether the segment is there."""
    ticket = segment(40) if is_written else new_ticket()
    store.mark(ticket)
    assert leave(planning, ticket)
    planning.over(saved={"r"}, loaded=(), failed=())
    ledger = planning.take_log()
    assert (ledger.kept, ledger.dropped) == (([ticket], []) if is_written else ([], [ticket]))


def test_a_request_that_ends_by_itself_or_has_no_kv_is_dropped(planning: KVScheduler, store: SegmentStore) -> None:
    """Its end was quicker than the cut; or it still waits."""
    for is_cut, num_tokens in ((False, 40), (True, 0)):
        ticket = new_ticket()
        store.mark(ticket)
        assert not leave(planning, ticket, num_tokens, is_cut=is_cut)
        assert planning.take_log().dropped == [ticket]


def test_a_request_that_is_cut_or_cancelled_while_it_loads_has_no_kv_to_keep(
    planning: KVScheduler, store: SegmentStore, segment: Callable[..., str]
) -> None:
    """And the end of its load changes nothing."""
    ticket, own = segment(100), new_ticket()
    num_tokens = planning.loadable_tokens(arrival(ticket, 101))
    planning.load("r", ticket, num_tokens=num_tokens, block_ids=list(range(7)))
    store.mark(own)
    assert not leave(planning, own, 100)
    assert planning.take_log().dropped == [own]
    planning.over(saved=(), loaded={"r"}, failed=())
    assert not planning.take_log()
    assert planning.loadable_tokens(arrival(segment(100), 101)) == 100  # the id may come again

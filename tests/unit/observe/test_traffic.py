"""Traffic as a trace: its rows, and the way back through the reader of `simulate`."""

from __future__ import annotations

import gzip
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.observe.traffic import RecordedRequest, recorded, trace_text, write_trace
from l4queue.policy.prefix_blocks import BLOCK_TOKENS
from l4queue.protocol.reads import FinishedRequest
from l4queue.sim.traces.rows import COLUMNS as READ_COLUMNS
from l4queue.sim.traces.trace import read_trace

_REQUESTS = st.lists(
    st.builds(
        RecordedRequest,
        submitted_ms=st.integers(1_700_000_000_000, 1_700_000_000_000 + 10**7),
        input_tokens=st.integers(1, 10**6),
        output_tokens=st.integers(1, 10**6),
    ),
    min_size=1,
    max_size=30,
)


def finished(**over: Any) -> FinishedRequest:
    """A request that was computed."""
    given: dict[str, Any] = {
        "request_id": "a",
        "state": "done",
        "prompt_tokens": 7,
        "output_tokens": 5,
        "submitted_ms": 1000,
        "started_ms": 1010,
        "first_token_ms": 1020,
        "finished_ms": 1100,
        "stage": "0",
        "worker": "w",
    }
    return FinishedRequest(**(given | over))


def test_what_an_engine_ran_is_recorded_however_it_ended() -> None:
    """A cancelled request took time, too; one that never began tells nothing of its output."""
    row = RecordedRequest(submitted_ms=1000, input_tokens=7, output_tokens=5)
    assert recorded(finished()) == recorded(finished(state="cancelled")) == row
    assert recorded(finished(state="expired", started_ms=None, output_tokens=0)) is None
    short = recorded(finished(output_tokens=0, state="failed"))
    assert short is not None
    assert short.output_tokens == 1


@pytest.mark.parametrize("name", ["traffic.csv", "traffic.csv.gz"])
@given(requests=_REQUESTS)
def test_a_written_trace_is_read_as_it_was(name: str, requests: list[RecordedRequest]) -> None:
    """Whatever the order in which requests ended; from 0 s on, to the ms."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_trace(path, requests)
        trace = read_trace(path)
        assert [child.name for child in Path(folder).iterdir()] == [name]

    rows = sorted(requests)
    first_ms = rows[0].submitted_ms
    assert trace.arrival_s == pytest.approx([(row.submitted_ms - first_ms) / 1000 for row in rows])
    assert trace.input_tokens.tolist() == [row.input_tokens for row in rows]
    assert trace.output_tokens.tolist() == [row.output_tokens for row in rows]


def test_prompts_that_begin_alike_have_the_same_numbers(tmp_path: Path) -> None:
    """Full blocks by their keys. The rest of a prompt, and what nothing is told of, are like no others."""
    a, b, c = (bytes([number]) * 8 for number in (7, 8, 9))
    rows = [
        RecordedRequest(submitted_ms=at, input_tokens=tokens, output_tokens=1, blocks=blocks)
        for at, tokens, blocks in (
            (0, 300, a + b),
            (1, 256, a + c),
            (2, 200, b""),
            (3, 384, a + b + c),
            (4, 5, b""),
        )
    ]
    write_trace(tmp_path / "t.csv", rows)

    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "arrival_s,input_tokens,output_tokens,hash_ids"
    assert [line.rpartition(",")[2] for line in lines[1:]] == ["0 1 2", "0 3", "4 5", "0 1 3", "6"]
    chains = read_trace(tmp_path / "t.csv", hash_block_tokens=BLOCK_TOKENS).chains
    assert chains is not None
    firsts = [chain[0].start if chain else None for chain in chains]
    assert firsts[0] == firsts[1] == firsts[3] != firsts[2]


def test_the_header_is_what_simulate_reads(tmp_path: Path) -> None:
    """Said once more here, so that nothing of the simulator is imported to write a file."""
    assert trace_text([]).strip() == ",".join(READ_COLUMNS)
    write_trace(tmp_path / "t.csv.gz", [])
    assert gzip.decompress((tmp_path / "t.csv.gz").read_bytes()).decode() == trace_text([])


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """Neither a part of it nor a change of another file."""
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_trace(tmp_path / "folder.csv", [])
    assert [child.name for child in tmp_path.iterdir()] == ["folder.csv"]

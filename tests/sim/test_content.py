"""Content of traces: hash ids in a column, beside the file and in Mooncake's lines, and sessions that grow."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from l4queue.errors import ConfigError, TraceError
from l4queue.sim.traces.content import Chains
from l4queue.sim.traces.sessions import SESSIONS, make_sessions
from l4queue.sim.traces.trace import Trace, read_trace

ROWS = [(0.0, 1100, 40, [0, 1, 2]), (0.5, 1024, 8, [0, 1]), (0.5, 600, 8, [0, 5]), (2.0, 40, 1, [9])]


def blocks(trace: Trace, row: int) -> list[int]:
    assert trace.chains is not None
    return [block for span in trace.chains[row] for block in span]


def with_column(folder: Path) -> Path:
    path = folder / "column.csv"
    lines = [f"{at},{prompt},{output},{' '.join(map(str, ids))}" for at, prompt, output, ids in ROWS]
    path.write_text("arrival_s,input_tokens,output_tokens,hash_ids\n" + "\n".join(lines) + "\n")
    return path


def with_file_beside(folder: Path) -> Path:
    path = folder / "beside.csv.gz"
    text = "arrival_s,input_tokens,output_tokens,group\n" + "".join(f"{a},{p},{o},7\n" for a, p, o, _ in ROWS)
    path.write_bytes(gzip.compress(text.encode()))
    ids = "".join(" ".join(map(str, row[3])) + "\n" for row in ROWS)
    (folder / "beside.hash_ids.txt.gz").write_bytes(gzip.compress(ids.encode()))
    return path


def with_lines(folder: Path) -> Path:
    path = folder / "lines.jsonl"
    rows = [
        {"timestamp": 1000 * at, "input_length": prompt, "output_length": output, "hash_ids": ids}
        for at, prompt, output, ids in ROWS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("write", [with_column, with_file_beside, with_lines])
def test_equal_leading_ids_are_equal_blocks_and_nothing_else_is(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of a prompt's last id only whole blocks count; outputs, and what hides behind another id, are new."""
    path = write(tmp_path)
    trace = read_trace(path, hash_block_tokens=512)

    assert trace.name == path.name.split(".")[0]
    assert trace.arrival_s.tolist() == [0.0, 0.5, 0.5, 2.0]
    found = [blocks(trace, row) for row in range(4)]
    assert [len(chain) for chain in found] == [1140 // 16, 1032 // 16, 608 // 16, 41 // 16]
    assert found[0][:64] == found[1][:64]
    assert found[0][:32] == found[2][:32]
    assert len(set().union(*found)) == 71 + 0 + (38 - 32) + 2
    assert read_trace(path).chains is None


def test_ids_mean_the_same_only_behind_the_same_beginning() -> None:
    chains = Chains(32)
    first = chains.chain([1, 2], prompt_tokens=64, output_tokens=0)
    other = chains.chain([3, 2], prompt_tokens=64, output_tokens=0)

    assert {b for span in first for b in span}.isdisjoint(b for span in other for b in span)


@pytest.mark.parametrize(
    ("row", "what"),
    [("0,600,1,5", "1 ids for 600 input_tokens, expected 2 of 512"), ("0,600,1,5 x", "whole numbers")],
)
def test_ids_that_do_not_fit_are_named(row: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"arrival_s,input_tokens,output_tokens,hash_ids\n{row}\n")

    with pytest.raises(TraceError, match=f"t.csv:2: hash_ids: .*{what}"):
        read_trace(path, hash_block_tokens=512)
    with pytest.raises(ConfigError, match="multiple of 16"):
        read_trace(path, hash_block_tokens=100)


def test_lines_that_are_missing_beside_a_file_and_keys_are_named(tmp_path: Path) -> None:
    path = with_file_beside(tmp_path)
    (tmp_path / "beside.hash_ids.txt.gz").write_bytes(gzip.compress(b"0 1 2\n"))
    with pytest.raises(TraceError, match=r"hash_ids.txt.gz:1: hash_ids: 1 lines for 4 requests of beside.csv.gz"):
        read_trace(path, hash_block_tokens=512)

    lines = tmp_path / "t.jsonl"
    lines.write_text('{"timestamp": 1}\n')
    with pytest.raises(TraceError, match=r"t.jsonl:1: input_length: the key is missing"):
        read_trace(lines)
    lines.write_text("{\n")
    with pytest.raises(TraceError, match=r"t.jsonl:1: timestamp: not readable as JSON"):
        read_trace(lines)


def test_content_and_sessions_go_with_their_rows(tmp_path: Path) -> None:
    trace = read_trace(with_file_beside(tmp_path), hash_block_tokens=512)
    part = trace.scaled(2.0).select([1, 3])

    assert part.arrival_s.tolist() == [0.25, 1.0]
    assert [blocks(part, 0), blocks(part, 1)] == [blocks(trace, 1), blocks(trace, 3)]
    assert part.sessions is not None
    assert part.sessions.tolist() == [0, 0]
    assert [r.session for r in part.requests()] == [0, 0]
    assert part.without_content().chains is None


@pytest.mark.parametrize("name", SESSIONS)
def test_turns_repeat_all_that_was_said_and_share_system_prompts(name: str) -> None:
    """A later prompt holds the whole blocks of the earlier one and its output; sessions share systems alone."""
    trace = make_sessions(name, num_requests=1500, seed=3, rate_rps=8.0)
    assert trace.sessions is not None
    last: dict[int, tuple[int, list[int]]] = {}
    followed = 0
    for row, (session, prompt, output) in enumerate(
        zip(trace.sessions.tolist(), trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    ):
        chain = blocks(trace, row)
        assert len(chain) == (prompt + output) // 16
        if session in last:
            said, before = last[session]
            assert prompt > said
            assert chain[: len(before)] == before
            followed += 1
        last[session] = prompt + output, chain
    assert followed > 500
    heads = [blocks(trace, row)[0] for row in range(len(trace)) if trace.input_tokens[row] >= 32]
    assert len(set(heads)) <= SESSIONS[name].num_systems + 3  # a system prompt may be shorter than a block
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert trace.arrival_s[0] >= 0


def test_a_faster_trace_of_sessions_has_more_of_them_and_thinks_no_faster() -> None:
    slow = make_sessions("multi-turn", num_requests=3000, seed=5, rate_rps=2.0)
    fast = slow.scaled(10.0)
    again = make_sessions("multi-turn", num_requests=3000, seed=5, rate_rps=20.0)

    assert slow.rate_rps == pytest.approx(2.0, rel=0.15)
    assert fast.rate_rps == pytest.approx(20.0, rel=0.15)
    assert fast.arrival_s.tolist() == again.arrival_s.tolist()
    assert fast.chains == again.chains
    gaps = []
    for trace in (slow, fast):
        assert trace.sessions is not None
        by_session: dict[int, float] = {}
        found = []
        for session, at_s in zip(trace.sessions.tolist(), trace.arrival_s.tolist(), strict=True):
            if session in by_session and at_s < 100.0:
                found.append(at_s - by_session[session])
            by_session[session] = at_s
        gaps.append(float(np.median(found)))
    assert gaps[1] == pytest.approx(gaps[0], rel=0.35)
    assert slow.without_content().scaled(2.0).chains is None


def test_an_unknown_workload_of_sessions_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="multi-turn, agent"):
        make_sessions("nonsense", num_requests=10, seed=0)

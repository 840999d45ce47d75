"""Trace files: what is read, and the one-line errors that name file, line and column."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from l4queue.errors import ConfigError, TraceError
from l4queue.sim.traces.trace import read_trace
from l4queue.sim.traces.workload import WORKLOADS, make_workload

HEADER = "arrival_s,input_tokens,output_tokens\n"


def test_a_plain_and_a_gzipped_file_read_alike(tmp_path: Path) -> None:
    """Extra columns, their order and a byte-order mark do not matter."""
    text = "group,output_tokens,arrival_s,input_tokens\na,5,0.5,100\nb,0,0.5,7.0\n"
    plain, packed = tmp_path / "t.csv", tmp_path / "t.csv.gz"
    plain.write_text("\ufeff" + text)
    packed.write_bytes(gzip.compress(text.encode()))

    for trace in (read_trace(plain), read_trace(packed)):
        assert trace.arrival_s.tolist() == [0.5, 0.5]
        assert trace.input_tokens.tolist() == [100, 7]
        assert trace.output_tokens.tolist() == [5, 1]
        assert trace.name == "t"


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azures_own_files_are_read(tmp_path: Path) -> None:
    """Both years' moments; the first request arrives at 0 s, whatever the zone of its moment."""
    rows = (
        "2023-11-16 23:59:59.9799600,4808,10\n2023-11-17 00:00:00.0319600,3180,8\n",
        "2024-05-10 00:00:00.009930+00:00,4808,10\n2024-05-10T02:00:00.061930+02:00,3180,8\n",
        "2024-05-10 00:00:00,4808,10\n2024-05-10 00:00:00.052Z,3180,8\n",
    )
    for text in rows:
        path = tmp_path / "AzureLLMInferenceTrace_code.csv"
        path.write_text(AZURE + text)
        trace = read_trace(path)
        assert trace.arrival_s == pytest.approx([0.0, 0.052], abs=1e-6)
        assert trace.input_tokens.tolist() == [4808, 3180]
        assert trace.output_tokens.tolist() == [10, 8]


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        (AZURE + "yesterday,1,1\n", "2: TIMESTAMP", "not a moment: 'yesterday'"),
        (AZURE + "2023-02-30 00:00:00,1,1\n", "2: TIMESTAMP", "not a moment"),
        (AZURE + "2023-01-01 00:00:01,1,1\n2023-01-01 00:00:00,1,1\n", "3: arrival_s", "negative"),
        (AZURE + "2023-01-01 00:00:01,1\n", "2: GeneratedTokens", "only 2 fields"),
        ("TIMESTAMP,ContextTokens\n", "1: arrival_s", "missing"),
        ("", "1: arrival_s", "empty"),
        ("arrival_s,input_tokens\n0,1\n", "1: output_tokens", "missing"),
        (HEADER, "2: arrival_s", "no requests"),
        (HEADER + "0,1,1\n1,-2,3\n", "3: input_tokens", "negative"),
        (HEADER + "nan,1,1\n", "2: arrival_s", "finite"),
        (HEADER + "0,1,NaN\n", "2: output_tokens", "finite"),
        (HEADER + "0,inf,1\n", "2: input_tokens", "finite"),
        (HEADER + "0,1,1\n\n5,1,1\n4,1,1\n", "5: arrival_s", "decrease"),
        (HEADER + "0,1\n", "2: output_tokens", "only 2 fields"),
        (HEADER + "0,abc,1\n", "2: input_tokens", "not a number"),
        (HEADER + "0,1.5,1\n", "2: input_tokens", "whole number"),
        (HEADER + "0,1e300,1\n", "2: input_tokens", "whole number"),
        (HEADER + "1e10,1,1\n", "2: arrival_s", "at most"),
        (HEADER + "9" * 5000 + ",1,1\n", "2: arrival_s", "must be finite"),
        (HEADER + '0,"-1\n\n ",1\n', "4: input_tokens", "not be negative, got -1"),
        (HEADER + '"a\nb",1,1\n', "3: arrival_s", "not a number: 'a b'"),
        ('"a\nb",c\n0,1\n', "1: arrival_s", "the header has a b, c"),
        (HEADER + "0," + "1" * 200_000 + ",1\n", "2: arrival_s", "field larger"),
    ],
)
def test_a_broken_file_names_file_line_and_column(tmp_path: Path, text: str, place: str, why: str) -> None:
    """The message is one line: path:line: column: reason."""
    path = tmp_path / "bad.csv"
    path.write_text(text)

    with pytest.raises(TraceError) as caught:
        read_trace(path)

    message = str(caught.value)
    assert message.startswith(f"{path}:{place}: ")
    assert why in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))


def test_files_that_cannot_be_opened_or_unpacked_are_trace_errors(tmp_path: Path) -> None:
    """A missing file, a directory, truncated gzip and bytes that are no text."""
    truncated = tmp_path / "cut.csv.gz"
    truncated.write_bytes(gzip.compress((HEADER + "0,1,1\n" * 50).encode())[:-12])
    binary = tmp_path / "bin.csv"
    binary.write_bytes(b"\xff\xfe\x00\x80")

    for path in (tmp_path / "absent.csv", tmp_path, truncated, binary):
        with pytest.raises(TraceError, match="cannot be read"):
            read_trace(path)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_synthetic_workload_has_its_stated_rate_and_quantiles(name: str) -> None:
    """Arrivals come at the rate asked for; medians lie on the published points; the same seed repeats."""
    trace = make_workload(name, num_requests=20_000, rng=np.random.default_rng(7), rate_rps=5.0)
    again = make_workload(name, num_requests=20_000, rng=np.random.default_rng(7), rate_rps=5.0)

    assert trace.rate_rps == pytest.approx(5.0, rel=0.03)
    assert np.array_equal(trace.input_tokens, again.input_tokens)
    if len(WORKLOADS[name]) == 1:
        model = WORKLOADS[name][0][1]
        assert np.median(trace.output_tokens) == pytest.approx(model.output_tokens[4], rel=0.05)
        assert np.quantile(trace.input_tokens, 0.9) == pytest.approx(model.input_tokens[6], rel=0.05)


def test_an_unknown_workload_names_the_known_ones() -> None:
    """The error tells what may be chosen."""
    with pytest.raises(ConfigError, match="reasoning"):
        make_workload("essay", num_requests=1, rng=np.random.default_rng(0))


def test_scaling_changes_the_rate_and_nothing_else() -> None:
    """Arrivals start at 0 and come `rate_scale` times as fast."""
    trace = make_workload("chat", num_requests=100, rng=np.random.default_rng(1))
    fast = trace.scaled(4.0)

    assert fast.arrival_s[0] == 0.0
    assert fast.rate_rps == pytest.approx(4.0 * trace.rate_rps)
    assert np.array_equal(fast.input_tokens, trace.input_tokens)

"""`l4queue simulate` on traces that know their content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4queue import cli

ARGUMENTS = ("--instances", "2", "--policy", "round-robin,cache-aware")


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    assert cli.main(["simulate", *arguments, *ARGUMENTS]) == 0
    return capsys.readouterr().out


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two conversations of ten turns, one prompt in three; each turn repeats the one before."""
    path = tmp_path / "talk.csv"
    lines = ["arrival_s,input_tokens,output_tokens,hash_ids"]
    for turn in range(20):
        talk, length = turn % 3, 2 + turn // 2
        lines.append(f"{turn},{512 * length},20,{' '.join(str(100 * talk + k) for k in range(length))}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_prefix_caches_are_on_where_a_trace_has_hash_ids(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table says so, and the share; JSON has it; the option switches them off."""
    found = json.loads(simulate(capsys, str(trace), "--json"))
    shares: list[Any] = [result["cached_share"] for result in found["results"]]
    assert found["setting"]["has_prefix_caches"] is True
    assert 0.0 < shares[0] < shares[1] < 1.0

    shown = simulate(capsys, str(trace))
    assert "on 2 instances with prefix caches (simulated)" in shown
    assert "prompt tokens cached" in shown
    assert f"{shares[1]:.1%}" in shown

    off = json.loads(simulate(capsys, str(trace), "--no-prefix-cache", "--json"))
    assert off["setting"]["has_prefix_caches"] is False
    assert [result["cached_share"] for result in off["results"]] == [None, None]
    assert off["results"][0]["mean_e2e_s"] > found["results"][0]["mean_e2e_s"]


def test_hash_ids_of_another_size_are_refused_and_can_be_told(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the place and the option."""
    assert cli.main(["simulate", str(trace), "--hash-block-tokens", "256"]) != 0
    assert "talk.csv:2: hash_ids: 2 ids for 1024 input_tokens, expected 4 of 256" in capsys.readouterr().err


def test_conversations_are_a_workload(capsys: pytest.CaptureFixture[str]) -> None:
    """`--load` gives the rate by more sessions."""
    found = json.loads(simulate(capsys, "--workload", "agent", "--num-requests", "200", "--load", "0.5", "--json"))

    assert found["setting"]["trace"] == "agent"
    assert found["setting"]["has_prefix_caches"] is True
    assert found["results"][1]["cached_share"] > 0.2

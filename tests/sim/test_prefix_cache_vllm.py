"""Prefix caches of simulated engines beside vLLM's: the same requests find the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parents[2] / "bench" / "prefix_cache.py"


def compared(*arguments: str) -> list[dict[str, float]]:
    """Rows of the benchmark."""
    command = [sys.executable, str(SCRIPT), "--seed", "1", "--json", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parents[1])
    rows: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])["results"]
    assert all(row["cached_vllm"] > 0 for row in rows)
    return rows


def test_requests_find_what_they_find_in_vllm() -> None:
    """One by one each the same; four at a time in a short cache within 5 % of all tokens."""
    alone, pressed = compared("--cases", "70:1:5,70:4:24")

    assert alone["requests_equal"] == alone["requests"] == 5
    assert pressed["cached_simulated"] == pytest.approx(pressed["cached_vllm"], rel=0.05)
    assert pressed["requests_equal"] > 0.8 * pressed["requests"]


def test_hundreds_of_requests_find_what_they_find_under_the_scheduler_of_vllm() -> None:
    """Without the model there is time for preemptions and for many evictions."""
    (pressed,) = compared("--scheduler-only", "--cases", "70:6:400")

    assert pressed["cached_simulated"] == pytest.approx(pressed["cached_vllm"], rel=0.05)
    assert pressed["requests_equal"] > 0.8 * pressed["requests"]

"""CPU time of processes."""

from __future__ import annotations

import os
import time

from l4queue.cli.bench.cpu_time import cpu_seconds


def test_it_is_what_the_process_itself_says() -> None:
    """Up to the kernel's tick."""
    before = time.process_time()
    found = cpu_seconds({"me": os.getpid()})["me"]
    tick = 2 / os.sysconf("SC_CLK_TCK")
    assert before - tick <= found <= time.process_time() + tick


def test_processes_that_are_gone_are_left_out() -> None:
    assert cpu_seconds({"none": None, "gone": 2**30}) == {}

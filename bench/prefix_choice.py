"""Prefix affinity as the planner chooses it, by a replay of what came, beside stages and affinity throughout.

    python bench/prefix_choice.py [--traffic race,multi-turn,agent,TRACE.csv.gz] [--loads 0.6,0.8,0.95] [--seed 0]
        [--workers 16] [--requests 1500] [--guess]

The first requests of each traffic are the record by which the planner decides, from one stage, as it does live.
What it chose with their content (`auto`), without (`false`), and prefix affinity (`true`) then serve the next
requests, on engines with prefix caches that begin empty; the first 30 % of these are not counted. `race` is the
traffic of docs/routers.md on two CPU engines; all others are on `h100`.

With `--guess` nothing is decided: all of the requests are served by one stage and with prefix affinity, which the
planner may guess while it has no replay.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from l4queue.cli.bench.traffic import bench_trace
from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.models import Plan, WorkerLoad
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.planner import Decision, PlannerSettings, Snapshot, plan
from l4queue.sim.capacity import capacity_rps
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.policies.l4_prefixes import PrefixL4
from l4queue.sim.records import MAX_ARRIVALS, RecordedArrival, arrivals_of, told_share
from l4queue.sim.replay import make_replay
from l4queue.sim.runner import Run, RunConfig, run_policy
from l4queue.sim.traces.sessions import SESSIONS, make_sessions
from l4queue.sim.traces.trace import Trace, read_trace

CPU = StepCost(  # of the tiny model on one core, as workers of the race measured it
    alpha_ms=4.2, beta_ms=0.33, gamma_ms=6e-4, pi_ms=0.085, psi_ms=4.8e-5, kv_capacity_tokens=262_144
)
CPU_PRICE = MovePrice(bandwidth_bytes_per_s=750e6, kv_bytes_per_token=4096, fixed_ms=50.0)
WARMUP_SHARE = 0.3


def traffic(name: str, load: float, *, workers: int, count: int, seed: int) -> tuple[Trace, RunConfig]:
    """Twice `count` requests at this share of the capacity, and the fleet that serves them."""
    if name == "race":
        setting = RunConfig(cost=CPU, num_instances=2, price=CPU_PRICE, warmup_share=WARMUP_SHARE)
        rate = 11.9 * load
        return bench_trace(None, "mixed", rate=rate, duration_s=2 * count / rate, seed=seed), setting
    setting = RunConfig(
        cost=load_coefficients("h100", "llama-3.1-8b"), num_instances=workers, warmup_share=WARMUP_SHARE
    )
    if name in SESSIONS:
        trace = make_sessions(name, num_requests=2 * count, seed=seed)
    else:
        trace = read_trace(Path(name), hash_block_tokens=512)
    best_rps = capacity_rps(trace, setting.cost, num_instances=workers)
    return trace.scaled(load * best_rps / trace.rate_rps).select(slice(0, 2 * count)), setting


def decided(record: Sequence[RecordedArrival], setting: RunConfig) -> tuple[Decision, float]:
    """The planner's decision by this record, and the CPU time that it took, s."""
    begun_s = time.process_time()
    ids = tuple(f"w{number}" for number in range(setting.num_instances))
    first = Plan.one_stage(version=1, num_workers=len(ids))
    buckets = Buckets.log_spaced(131_072)
    lengths = [a.input_tokens for a in record], [a.output_tokens for a in record]
    snapshot = Snapshot(
        now_ms=10**9,
        plan=replace(first, stages=(replace(first.stages[0], worker_ids=ids),)),
        loads=tuple(WorkerLoad(worker_id=name) for name in ids),
        demand=Demand.of_requests(buckets, *lengths, duration_s=record[-1].arrival_s - record[0].arrival_s),
        cost=setting.cost,
        buckets=buckets,
    )
    replay = make_replay(record, cost=setting.cost, num_instances=len(ids), price=setting.price)
    return plan(snapshot, PlannerSettings(), replay=replay), time.process_time() - begun_s


def served(chosen: Plan, trace: Trace, setting: RunConfig) -> Run:
    """A run under a plan that stays."""
    policy = PrefixL4(L4Options()) if chosen.prefix_affinity else L4(L4Options(), fixed=chosen)
    return run_policy(policy, trace, setting)


def shown(chosen: Plan) -> str:
    """A plan in a few letters."""
    if chosen.prefix_affinity:
        return "affinity"
    return " | ".join(f"{s.low_tokens}+ x {s.num_workers}" for s in chosen.stages)


def line(run: Run) -> str:
    """Mean, p99, mean of the longest 5 %, share of cached tokens."""
    e2e_s = run.measured.e2e_s
    figures = e2e_s.mean(), np.quantile(e2e_s, 0.99), e2e_s[run.measured.is_long].mean()
    return "  ".join(f"{value:7.3f}" for value in figures) + f"  {run.result.cached_share or 0.0:6.1%}"


def guessed(trace: Trace, setting: RunConfig) -> str:
    """What affinity makes of one stage: mean, p99, longest 5 % in ratio; what comes again in the first 400."""
    whole = replace(setting, warmup_share=0.0)
    one, other = (
        served(replace(Plan.one_stage(num_workers=setting.num_instances), prefix_affinity=goes), trace, whole)
        for goes in (False, True)
    )
    before, after, is_long = one.measured.e2e_s, other.measured.e2e_s, one.measured.is_long
    figures = (
        after.mean() / before.mean(),
        np.quantile(after, 0.99) / np.quantile(before, 0.99),
        after[is_long].mean() / before[is_long].mean(),
    )
    share = told_share(arrivals_of(trace.select(slice(0, 400))))
    return "  ".join(f"{value:.2f}" for value in figures) + f"  comes again {share:.0%}"


def main() -> None:
    """Choose, serve, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traffic", default="race,multi-turn,agent")
    parser.add_argument("--loads", default="0.6,0.8,0.95")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--requests", type=int, default=MAX_ARRIVALS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guess", action="store_true")
    args = parser.parse_args()
    print("traffic, load, plan: mean s, p99 s, longest 5 % s, cached")
    for name in args.traffic.split(","):
        for load in map(float, args.loads.split(",")):
            trace, setting = traffic(name, load, workers=args.workers, count=args.requests, seed=args.seed)
            if args.guess:
                print(f"{Path(name).name} {load:.0%}: affinity to one stage {guessed(trace, setting)}", flush=True)
                continue
            half = len(trace) // 2
            record, later = arrivals_of(trace.select(slice(0, half))), trace.select(slice(half, len(trace)))
            auto, took_s = decided(record, setting)
            never, never_s = decided([replace(a, blocks=b"") for a in record], setting)
            always = replace(Plan.one_stage(num_workers=setting.num_instances), prefix_affinity=True)
            print(f"{Path(name).name} {load:.0%}: auto chose {shown(auto.plan)} ({auto.reason}) in {took_s:.1f} s")
            for setting_name, chosen in (("auto", auto.plan), ("false", never.plan), ("true", always)):
                if setting_name == "auto" and chosen.prefix_affinity:
                    continue  # as `true`
                print(f"  {setting_name:6} {line(served(chosen, later, setting))}  {shown(chosen)}", flush=True)
            print(f"  without content it decides in {never_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()

"""Holds what `bench serve` measured on emulated engines against the simulator, under the same settings.

    python bench/live_validation.py merge OUT.csv TRACE.csv.gz TRACE.csv.gz
    l4queue bench serve OUT.csv --engine emulated --workers 16 --workers-per-process 8 --rate-scale 3 \\
        --duration-s 540 --warmup-s 60 --rounds 1 --no-rehearse --policy l4 --json > RUN.json
    python bench/live_validation.py compare OUT.csv RUN.json... [--img DIR] [--doc docs/simulator.md]

`compare` reads rate, warm-up, workers, engine and planner periods from the run, simulates every policy that it
has, prints both with the deviation of the live figure from the simulated one, and can write the plot and the block
between the `live` marks of a document. Live, requests that arrive at one instant reach the queue in any order:
`--orders N` simulates N of them and tells the least and the greatest figure. A run of vLLM is simulated with its
own limits and the coefficients that `--gpu` names.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from l4queue.cli.bench.traffic import bench_trace
from l4queue.cost.coefficients import read_coefficients
from l4queue.cost.move import MovePrice
from l4queue.models import Plan, Routing, StagePlan
from l4queue.plan_json import split_of
from l4queue.policy.push_routing import PUSHING, Outstanding, push
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.plots import require_matplotlib, save_figure
from l4queue.sim.policies.central import Central, CentralSjf
from l4queue.sim.policies.l4 import L4, L4Options
from l4queue.sim.policies.views import worker_id
from l4queue.sim.policy import Policy
from l4queue.sim.prove import prove_recent
from l4queue.sim.records import MAX_ARRIVALS
from l4queue.sim.results import Measured, SimResult, summarize
from l4queue.sim.runner import RunConfig, run_policy
from l4queue.sim.traces.trace import Trace, read_trace

BEGIN, END = "<!-- live: begin -->", "<!-- live: end -->"
FIGURES = (
    ("mean, s", "mean_e2e_s", 2),
    ("p50", "p50_e2e_s", 2),
    ("p99", "p99_e2e_s", 2),
    ("TTFT, s", "mean_ttft_s", 3),
    ("p50", "p50_ttft_s", 3),
    ("p99", "p99_ttft_s", 2),
    ("TPOT, s", "mean_tpot_s", 4),
    ("p99", "p99_tpot_s", 3),
    ("short 95 %, s", "short.mean_e2e_s", 2),
    ("long 5 %, s", "long.mean_e2e_s", 2),
)
MOVES = ("num_handovers", "num_steals", "num_preemptions")
_TIMES = ("arrival_s", "finish_s", "e2e_s", "ttft_s", "tpot_s")


class Pushed(Policy):
    """The routings that push at arrival, by the live router's own function."""

    def __init__(self, plan: Plan) -> None:
        self.name = plan.routing.value
        self._plan = plan
        self._turn = 0

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """To the worker that the router would choose."""
        instances = {worker_id(instance): instance for instance in self.cluster.instances}
        outstanding = [
            Outstanding(worker_id=name, num_requests=i.num_requests, tokens=i.held_tokens)
            for name, i in instances.items()
        ]
        chosen = push(request.prompt_tokens, self._plan, outstanding, turn=self._turn).worker_id
        assert chosen is not None
        self._turn += 1
        self.cluster.push(request, instances[chosen])


@dataclass(frozen=True)
class Case:
    """One policy: figures by dotted key, live and simulated.

    `orders` has what is simulated for other orders of simultaneous arrivals.
    """

    policy: str
    live: Mapping[str, Any]
    simulated: Mapping[str, Any]
    orders: tuple[Mapping[str, Any], ...]


def merge(out: Path, paths: Sequence[Path]) -> None:
    """One trace of all, in order of arrival."""
    traces = [read_trace(path) for path in paths]
    arrival = np.concatenate([t.arrival_s for t in traces])
    order = np.argsort(arrival, kind="stable")
    columns = (
        np.concatenate([getattr(t, name) for t in traces])[order] for name in ("input_tokens", "output_tokens")
    )
    rows = (f"{at:.6f},{i},{o}\n" for at, i, o in zip(arrival[order], *columns, strict=True))
    out.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(rows))


def compare(trace_file: Path, run: Mapping[str, Any], *, num_orders: int = 0) -> list[Case]:
    """Every policy of the run beside its simulations."""
    setting = run["setting"]
    speed = setting["settings"]["emulated_speed"] or 1.0
    seconds = setting["warmup_s"] + setting["duration_s"]
    trace = bench_trace(
        trace_file, "", rate=None, rate_scale=setting["rate_scale"], duration_s=seconds, seed=setting["seed"]
    )

    def simulated(live: Mapping[str, Any], played: Trace = trace) -> dict[str, Any]:
        return _simulate(_policy(live, setting, speed=speed), played, setting, speed=speed)

    return [
        Case(
            policy=live["policy"],
            live=live,
            simulated=simulated(live),
            orders=tuple(simulated(live, _reordered(trace, seed=n)) for n in range(num_orders)),
        )
        for live in run["results"]
    ]


def _reordered(trace: Trace, *, seed: int) -> Trace:
    """Requests that arrive at one instant in another order."""
    order = np.lexsort((np.random.default_rng(seed).random(len(trace)), trace.arrival_s))
    return trace.select(order)


def _policy(live: Mapping[str, Any], setting: Mapping[str, Any], *, speed: float) -> Policy:
    routing, settings = Routing(live["policy"]), setting["settings"]
    if routing in PUSHING:
        return Pushed(_plan(routing, live["rounds"][0]["plans"][0], num_workers=setting["num_workers"]))
    if routing is Routing.CENTRAL:
        return Central()
    if routing is Routing.CENTRAL_SJF:
        return CentralSjf()
    if settings["steal_from"] != "any":
        raise SystemExit("steal_from other than any: not compared here")
    options = L4Options(
        without=frozenset() if settings["hand_over"] else frozenset({"hand-over"}),
        replan_s=settings["replan_interval_s"] / speed,
        refine_s=settings["refine_interval_s"] / speed,
        half_life_s=settings["demand_half_life_s"] / speed,
        min_life_s=settings["plan_min_life_s"] / speed,
        min_gain=settings["plan_min_gain"],
    )
    policy = L4(options, prove=prove_recent)
    policy.traffic.recent = deque(maxlen=MAX_ARRIVALS)
    return policy


def _plan(routing: Routing, split: Mapping[str, Any], *, num_workers: int) -> Plan:
    ids = [f"{index:04d}" for index in range(num_workers)]
    edges, stages = [0, *split["boundaries"], None], []
    for low, high, count in zip(edges[:-1], edges[1:], split["workers"], strict=True):
        mine, ids = ids[:count], ids[count:]
        stages.append(StagePlan(low_tokens=low or 0, high_tokens=high, num_workers=count, worker_ids=tuple(mine)))
    return Plan(version=1, stages=tuple(stages), routing=routing)


def _simulate(policy: Policy, trace: Trace, setting: Mapping[str, Any], *, speed: float) -> dict[str, Any]:
    """The run's figures by the simulator; engines that take `speed` times as long are the same in slow motion."""
    settings = setting["settings"]
    coefficients = read_coefficients(settings["emulated_gpu"], settings["emulated_model"])
    cost = coefficients.cost
    if setting["engine"] == "vllm":
        limits = ("kv_capacity_tokens", "max_batched_tokens", "max_num_seqs")
        cost = replace(cost, **{name: setting["cost_of_a_worker"][name] for name in limits})
    elif settings["max_running"] < cost.max_num_seqs:
        raise SystemExit(f"L4_MAX_RUNNING was {settings['max_running']}: the engines allow {cost.max_num_seqs}")
    bandwidth = settings["emulated_kv_bytes_per_s"] or None
    price = MovePrice(bandwidth_bytes_per_s=bandwidth, kv_bytes_per_token=coefficients.kv_bytes_per_token)
    price = replace(price, fixed_ms=price.fixed_ms / speed)
    run = run_policy(
        policy,
        trace.scaled(speed),
        RunConfig(
            cost=cost,
            num_instances=setting["num_workers"],
            seed=setting["seed"],
            price=price,
        ),
    )
    is_counted = trace.arrival_s >= setting["warmup_s"]
    values = {f.name: getattr(run.measured, f.name)[is_counted] for f in fields(Measured)}
    measured = Measured(**{name: v * speed if name in _TIMES else v for name, v in values.items()})
    moves = {name: getattr(run.result, name) for name in MOVES}
    result: SimResult = summarize(policy.name, measured, **moves)
    levels = np.linspace(0, 1, 101)
    quantiles = {name: np.quantile(getattr(measured, name), levels).tolist() for name in ("e2e_s", "ttft_s")}
    plans = [{"at_s": at_s * speed, **split_of(p.stages)} for at_s, p in getattr(policy, "plans", [])]
    more = {"mean_ttft_s": float(measured.ttft_s.mean()), "quantiles": quantiles, "plans": plans}
    return {**result.to_dict(), **more}


def _figure(entry: Mapping[str, Any], key: str) -> float:
    value: Any = entry
    for part in key.split("."):
        value = value[part]
    return float("nan") if value is None else float(value)


def table(cases: Sequence[Case]) -> str:
    """Markdown: live and simulated for each policy; in brackets by how much live exceeds that, in %."""
    lines = ["| policy | | " + " | ".join(name for name, _, _ in FIGURES) + " | moves | requests |"]
    lines.append("|---" * (len(FIGURES) + 4) + "|")
    for case in cases:
        for label, entry in (("live", case.live), ("simulated", case.simulated)):
            cells = [_cell(entry, case.live, key, digits) for _, key, digits in FIGURES]
            moves = "+".join(str(entry[key]) for key in MOVES)
            first = case.policy if entry is case.live else ""
            lines.append(f"| {first} | {label} | " + " | ".join(cells) + f" | {moves} | {entry['num_requests']} |")
        if case.orders:
            cells = [_range(case.orders, key, digits) for _, key, digits in FIGURES]
            lines.append(f"| | {len(case.orders)} orders | " + " | ".join(cells) + " | | |")
    return "\n".join(lines)


def _range(entries: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    values = [_figure(entry, key) for entry in entries]
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


def _cell(entry: Mapping[str, Any], live: Mapping[str, Any], key: str, digits: int) -> str:
    text = f"{_figure(entry, key):.{digits}f}"
    return text if entry is live else f"{text} ({100 * (_figure(live, key) / _figure(entry, key) - 1):+.0f})"


def _label(case: Case) -> str:
    return f"{case.policy}, {case.live['num_requests']} requests"


def plot(cases: Sequence[Case], file: Path) -> Path:
    """Cumulative distributions, live beside simulated."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    share = np.linspace(0, 1, 101)
    for index, case in enumerate(cases):
        for axis, key in zip(axes, ("e2e_s", "ttft_s"), strict=True):
            axis.plot(case.live["quantiles"][key], share, color=f"C{index}", label=_label(case))
            axis.plot(case.simulated["quantiles"][key], share, color=f"C{index}", ls="--")
    for axis, label in zip(axes, ("end to end, s", "time to first token, s"), strict=True):
        axis.set(xscale="log", xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="share of requests", title="live: solid, simulated: dashed")
    axes[0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(plt, figure, file)


def main() -> None:
    """Merge traces, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge", help="several traces as one")
    merging.add_argument("out", type=Path)
    merging.add_argument("traces", type=Path, nargs="+")
    comparing = commands.add_parser("compare", help="live runs beside their simulation")
    comparing.add_argument("trace", type=Path)
    comparing.add_argument("runs", type=Path, nargs="+")
    comparing.add_argument("--img", type=Path, help="directory for the plot")
    comparing.add_argument("--doc", type=Path, help="document whose `live` block is written anew")
    comparing.add_argument("--orders", type=int, default=0, help="orders of simultaneous arrivals to simulate")
    comparing.add_argument("--plans", action="store_true", help="print how the plans of l4 changed")
    comparing.add_argument("--gpu", help="simulate with this GPU's coefficients")
    given = parser.parse_args()
    if given.command == "merge":
        merge(given.out, given.traces)
        return
    runs = [json.loads(file.read_text()) for file in given.runs]
    for run in runs:
        run["setting"]["settings"]["emulated_gpu"] = given.gpu or run["setting"]["settings"]["emulated_gpu"]
    cases = [case for run in runs for case in compare(given.trace, run, num_orders=given.orders)]
    text = table(cases)
    print(text)
    if given.plans:
        for case in cases:
            for where, plans in (
                ("live", case.live["rounds"][0]["plans"]),
                ("simulated", case.simulated["plans"]),
            ):
                for one in plans if case.policy == Routing.L4 else ():
                    print(f"{where}: {one['at_s']:.1f} s: {one['boundaries']} {one['workers']}")
    if given.img is not None:
        print(plot(cases, given.img / "live-validation.png"))
    if given.doc is not None:
        before, _, rest = given.doc.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        given.doc.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()

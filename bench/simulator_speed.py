"""How fast the simulator is: one hour of a reasoning trace on 16 instances, and 16 times that load on 256.

    python bench/simulator_speed.py [--policy NAME] [--json]

Uses the ServeGen DeepSeek-R1 hour of the folder in L4_SHARED_DIR (default ../shared), below `traces`; without it a
synthetic `reasoning` workload of the same number of requests. With prefix caches each client of the trace has a
system prompt of 512 tokens, and all else is new.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from told import machine

from l4queue.cost.coefficients import read_coefficients
from l4queue.cost.move import MovePrice
from l4queue.sim.cluster import Cluster
from l4queue.sim.registry import make_policy
from l4queue.sim.runner import RunConfig
from l4queue.sim.traces.content import Chains, num_hashes
from l4queue.sim.traces.trace import Trace, read_trace
from l4queue.sim.traces.workload import make_workload

FILE = "servegen_deepseek_r1.h01.csv.gz"
CASES = (
    ("round-robin", 16, 1.0, False),
    ("central", 16, 1.0, False),
    ("central", 16, 1.0, True),
    ("cache-aware", 16, 1.0, True),
    ("l4", 16, 1.0, False),
    ("l4", 16, 1.0, True),
    ("least-requests", 256, 16.0, False),
    ("l4", 256, 16.0, False),
)
"""Policy, instances, factor on the rate, prefix caches."""
SYSTEM_TOKENS = 512


def hour() -> Trace:
    """The trace, or a stand-in of the same size."""
    path = Path(os.environ.get("L4_SHARED_DIR", "../shared")) / "traces" / FILE
    if path.is_file():
        return read_trace(path)
    return make_workload("reasoning", num_requests=80_098, rng=np.random.default_rng(1), rate_rps=22.25)


def with_content(trace: Trace) -> Trace:
    """The trace with a system prompt for each client."""
    chains = Chains(SYSTEM_TOKENS)
    sessions = np.zeros(len(trace), dtype=np.int64) if trace.sessions is None else trace.sessions
    rows = zip(sessions.tolist(), trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    return replace(
        trace,
        chains=tuple(
            chains.chain(
                [-1 - client, *(number << 8 | k for k in range(1, num_hashes(prompt, SYSTEM_TOKENS)))],
                prompt_tokens=prompt,
                output_tokens=output,
            )
            for number, (client, prompt, output) in enumerate(rows)
        ),
    )


def measure(trace: Trace, policy: str, *, num_instances: int, rate_scale: float) -> dict[str, float | int | str]:
    """Wall-clock time of one run, with the engine steps that it stands for."""
    coefficients = read_coefficients("h100", "llama-3.1-8b")
    price = MovePrice(bandwidth_bytes_per_s=50e9, kv_bytes_per_token=coefficients.kv_bytes_per_token)
    setting = RunConfig(cost=coefficients.cost, num_instances=num_instances, price=price)
    scaled = trace.scaled(rate_scale)
    made = make_policy(policy, trace=scaled, setting=setting)
    cluster = Cluster(
        scaled.requests(),
        cost=setting.cost,
        num_instances=num_instances,
        policy=made,
        rng=np.random.default_rng(0),
        price=price,
    )
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    cluster.run()
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    steps = sum(i.num_steps for i in cluster.instances)
    return {
        "policy": policy,
        "num_instances": num_instances,
        "has_prefix_caches": trace.chains is not None,
        "num_requests": len(trace),
        "output_tokens": int(trace.output_tokens.sum()),
        "simulated_s": round(cluster.now_s, 1),
        "engine_steps": steps,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "requests_per_wall_s": round(len(trace) / wall_s),
    }


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--policy", help="Only the cases of this policy.")
    given = parser.parse_args()
    trace = hour()
    content = with_content(trace)
    rows = [
        measure(content if has_caches else trace, policy, num_instances=n, rate_scale=scale)
        for policy, n, scale, has_caches in CASES
        if given.policy in (None, policy)
    ]
    if given.json:
        print(json.dumps({"trace": trace.name, "machine": machine(), "results": rows}, indent=2))
        return
    print(f"{trace.name}, {machine()}")
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()

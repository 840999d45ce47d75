"""A batch through `/v1/batches` under SIGKILL of the gateway that runs it, against an uninterrupted run.

    python bench/http_batch.py [--lines 10000] [--engine emulated|vllm] [--json]

Redis, a dispatcher, a worker and two gateways are real processes. The same input runs twice. The second time the
gateway that runs it is killed at 20 %, the other one goes on and is killed at 60 %, and the first one is started
again. Counted are lines, each `custom_id` once, and answers that differ; the emulated engine's have no text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from told import machine, tell

from l4queue import Settings
from l4queue.model_cache import cache_directory
from tests.protocol.server import DURABLE, RedisServer, redis_binary
from tests.services.gateways import Gateways
from tests.services.killed_batches import answers_of, batch_lines, begin, ended, kill_its_gateway
from tests.services.processes import Processes, until
from workers.tiny import build_tiny_model

NAMES = ("gateway-0", "gateway-1")


def measure(gateways: Gateways, *, num_lines: int) -> dict[str, Any]:
    """Both runs."""
    for name in NAMES:
        gateways.start(name)
    gateways.processes.start("dispatcher", "-m", "dispatcher")
    gateways.processes.worker("worker-0")
    for name in NAMES:
        gateways.answers(name)
    with gateways.queue() as client:
        until(lambda: client.overview().workers, "a worker", timeout_s=900)
    lines = batch_lines(num_lines, max_tokens=8)
    begun_s = time.perf_counter()
    whole = ended(gateways, NAMES[0], begin(gateways, NAMES[0], lines))
    whole_s = time.perf_counter() - begun_s
    wanted = answers_of(gateways, NAMES[0], whole)
    killed: list[str] = []
    begun_s = time.perf_counter()
    batch = begin(gateways, NAMES[0], lines)
    for part in (0.2, 0.6):
        alive = [name for name in NAMES if name not in killed]
        killed.append(kill_its_gateway(gateways, alive, batch, num_completed=int(part * num_lines)))
    left = killed[0]
    gateways.start(left)
    gateways.answers(left)
    last = ended(gateways, left, batch)
    cut_s = time.perf_counter() - begun_s
    found = answers_of(gateways, left, last)
    with gateways.queue() as client:
        counts = client.overview().counts
    return {
        "num_lines": num_lines,
        "killed": killed,
        "states": [whole.status, last.status],
        "request_counts": [one.request_counts.to_dict() for one in (whole, last) if one.request_counts],
        "num_custom_ids": [len(wanted), len(found)],
        "num_differing": sum(found.get(name) != answer for name, answer in wanted.items()),
        "num_accepted": int(counts["submitted"]),
        "wall_s": [round(whole_s, 1), round(cut_s, 1)],
        "machine": machine(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--engine", choices=("emulated", "vllm"), default="emulated")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model, binary = build_tiny_model(cache_directory()), redis_binary()
    assert binary is not None, "redis-server is not on PATH"
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(binary, Path(folder), DURABLE).start()
        values: dict[str, object] = {
            "redis_url": server.url,
            "model": str(model),
            "tokenizer": str(model),
            "max_model_len": 2048,
            "engine": arguments.engine,
            "dtype": "float32",
        }
        processes = Processes(Path(folder), **values)
        settings = Settings(**values)  # type: ignore[arg-type] # the same values, typed by pydantic
        try:
            gateways = Gateways(processes=processes, settings=settings, model=model)
            tell(measure(gateways, num_lines=arguments.lines), as_json=arguments.json)
        finally:
            processes.close()
            server.kill()


if __name__ == "__main__":
    main()

"""The figures and plots of docs/performance.md: measures with `l4queue bench queue`, then writes the page.

    python bench/performance.py [--rounds 5] [--only queue,queue-sizes]   # measures; about half an hour
    python bench/performance.py --write                                     # the page from the JSON that is there

JSON goes to bench/results/queue*.json, plots to docs/img/queue-*.png, tables between the marks of the page.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l4queue.cli.bench.queue.plots import plot_queues

ROOT = Path(__file__).resolve().parents[1]
PAGE, IMAGES, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "img", ROOT / "bench" / "results"
RUNS = {
    "queue": ("--peers", "all", "--durability", "fast,strict"),
    "queue-sizes": (
        *("--durability", "fast", "--input", "ids", "--peers", "bullmq"),
        *("--prompt-bytes", "200,4000,40000,400000", "--latencies", "0"),
    ),
    "queue-text": ("--durability", "fast", "--prompt-bytes", "200,4000,40000", "--latencies", "0"),
    "queue-clients": ("--durability", "fast,strict", "--clients", "4", "--latencies", "0"),
}
"""Options by the name of the file of results."""
KINDS = ("total", "redis", "dispatcher", "worker", "client", "planner")


def measure(name: str, *, rounds: int) -> None:
    """One run; its JSON is kept."""
    command = [str(Path(sys.executable).with_name("l4queue")), "bench", "queue", *RUNS[name]]
    command += ["--rounds", str(rounds), "--json", str(RESULTS / f"{name}.json")]
    print("$", " ".join(("l4queue", *command[1:])), flush=True)
    subprocess.run(command, check=True)


def write() -> None:
    """Tables and plots from the JSON."""
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in RUNS}
    text = PAGE.read_text("utf-8")
    blocks = {
        "machine": _machine(found["queue"]),
        "work": _work(found["queue"]["queues"]),
        "ratios": _ratios(found["queue"]["ratios"]),
        "redis": _redis(found["queue"]["queues"]),
        "latency": _latency(found["queue"]["queues"]),
        "sizes": _sizes(found["queue-sizes"], found["queue-text"]),
        "clients": _work(found["queue-clients"]["queues"]),
    }
    for name, lines in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, number = re.subn(
            pattern, lambda m, lines=lines: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.S
        )
        assert number == 1, f"{PAGE.name} has {number} places for {name}"
    PAGE.write_text(text, "utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for name, files in (("queue", ("queue-work", "queue-latency")), ("queue-sizes", ("queue-sizes",))):
            plot_queues(Path(folder), found[name])
            for file in files:
                (Path(folder) / f"{file}.png").replace(IMAGES / f"{file}.png")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def _machine(found: Mapping[str, Any]) -> list[str]:
    facts, rounds = found["machine"], [one for queue in found["queues"] for one in queue["rounds"]]
    foreign = [one["foreign_cores"] for one in rounds]
    work = [one["fixed_work_ms"] for one in rounds]
    python, redis = facts["versions"]["python"], facts["versions"]["redis-server"]
    return [
        f"{facts['cores']} cores of {facts['cpu']}, {facts['memory_bytes'] / 2**30:.0f} GiB, {facts['system']}, "
        f"{redis}, Python {python}; rounds: {found['setting']['rounds']}. Other processes had {min(foreign):.1f} "
        f"to {max(foreign):.1f} cores during the rushes. The same work took {min(work):.2f} to {max(work):.2f} ms "
        f"of CPU time from one round to another. An fsync took {facts['fsync_ms']['p50']:.2f} ms (p50)."
    ]


def _work(queues: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| queue | requests/s | min–max | CPU s per 1,000 | " + " | ".join(KINDS[1:]) + " |",
        "|---" * 9 + "|",
    ]
    for one in queues:
        rate, cpu = one["requests_per_s"], one["cpu_s_per_1000"]
        parts = [f"{cpu[kind]['median']:.3f}" if kind in cpu else "" for kind in KINDS]
        row = (one["name"], f"{rate['median']:,.0f}", f"{rate['min']:,.0f}–{rate['max']:,.0f}", *parts)
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _ratios(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| l4queue `fast` to | requests/s | min–max | CPU time | min–max |", "|---|---|---|---|---|"]
    for one in found:
        rate, cpu = one["requests_per_s"], one["cpu_s"]
        cells = [f"{s['median']:.2f} | {s['min']:.2f}–{s['max']:.2f}" for s in (rate, cpu)]
        lines.append(f"| {one['to']} | {cells[0]} | {cells[1]} |")
    return lines


def _redis(queues: Sequence[Mapping[str, Any]]) -> list[str]:
    head = "| queue | commands | inside scripts | bytes in | bytes out | bytes kept | packed | packing, CPU s |"
    lines = [head, "|---" * 8 + "|"]
    for one in queues:
        sizes = (f"{one[name]['median']:,.0f}" for name in ("bytes_in", "bytes_out", "kept_bytes"))
        packed, cpu_s = one["packed_bytes"]["median"], one["packing_cpu_s_per_1000"]["median"]
        more = (f"{packed:,.0f}", f"{cpu_s:.3f}") if packed is not None else ("", "")
        row = (one["name"], f"{one['sent_commands']:.1f}", f"{one['inside_commands']:.1f}", *sizes, *more)
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _latency(queues: Sequence[Mapping[str, Any]]) -> list[str]:
    head = "| queue | first token, alone | result, alone | half of the rate | first token, at it | result, at it |"
    lines = [head, "|---|---|---|---|---|---|"]
    for one in queues:
        alone, half, rate = one["alone_ms"], one["half_ms"], one["half_rate_per_s"]["median"]
        row = [one["name"], _quantiles(alone, "first"), _quantiles(alone, "result")]
        row += [f"{rate:,.0f}/s" if rate else "", _quantiles(half, "first"), _quantiles(half, "result")]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _quantiles(latencies: Mapping[str, Any], kind: str) -> str:
    return f"{latencies[kind]['p50']:.1f} / {latencies[kind]['p99']:.1f}" if kind in latencies else ""


def _sizes(ids: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    """Token ids, text, BullMQ and Redis alone by size."""
    head = "| prompt | queue | requests/s | CPU s per 1,000 | of it Redis | dispatcher | bytes in | bytes kept |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    named = [(one, one["name"] + (", ids" if one["name"].startswith("l4") else "")) for one in ids["queues"]]
    named += [(one, f"{one['name']}, text") for one in text["queues"]]
    for one, name in sorted(named, key=_by_size):
        cpu = one["cpu_s_per_1000"]
        shown = [f"{cpu[kind]['median']:.3f}" if kind in cpu else "" for kind in ("total", "redis", "dispatcher")]
        sizes = [f"{one[field]['median']:,.0f}" for field in ("bytes_in", "kept_bytes")]
        row = (f"{one['prompt_bytes']:,} B", name, f"{one['requests_per_s']['median']:,.0f}", *shown, *sizes)
        lines.append("| " + " | ".join(row) + " |")
    for one in ids["ceilings"]:
        rate, cpu_s = f"{one['requests_per_s']:,.0f}", f"{one['redis_cpu_s_per_1000']:.3f}"
        lines.append(f"| {one['prompt_bytes']:,} B | Redis alone | {rate} | | {cpu_s} | | | |")
    return lines


def _by_size(pair: tuple[Mapping[str, Any], str]) -> tuple[int, bool, str]:
    """Ours first within a size."""
    return int(pair[0]["prompt_bytes"]), not pair[1].startswith("l4"), pair[1]


def main() -> None:
    """Measure and write, or write only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(RUNS), help="runs to make again, comma-separated")
    parser.add_argument("--write", action="store_true", help="write the page, measure nothing")
    given = parser.parse_args()
    for name in () if given.write else given.only.split(","):
        measure(name, rounds=given.rounds)
    write()


if __name__ == "__main__":
    main()

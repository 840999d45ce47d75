"""A part of a trace at a load that one engine bears: `python -m bench.gpu.trace TRACE.csv.gz OUT.csv`.

From a third of its requests on, arrivals are scaled so that the next 3,000 are that share of what one engine gets
done by the coefficients; those of the first `--duration-s` seconds are written.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.step import StepCost
from l4queue.sim.capacity import capacity_rps
from l4queue.sim.traces.trace import Trace, read_trace

__all__ = ("part",)

WINDOW = 3000


def part(trace: Trace, cost: StepCost, *, load: float, duration_s: float, most_tokens: int) -> Trace:
    """The part, with times from zero. Requests of more than `most_tokens` are left out."""
    first = len(trace.arrival_s) // 3
    arrival_s = trace.arrival_s[first:] - trace.arrival_s[first]
    inputs, outputs = trace.input_tokens[first:], trace.output_tokens[first:]
    window = Trace(
        name=trace.name,
        arrival_s=arrival_s[:WINDOW],
        input_tokens=inputs[:WINDOW],
        output_tokens=outputs[:WINDOW],
    )
    rate_rps = (len(window.arrival_s) - 1) / window.arrival_s[-1]
    arrival_s = arrival_s * rate_rps / (load * capacity_rps(window, cost, num_instances=1))
    kept = (arrival_s < duration_s) & (inputs + outputs < most_tokens)
    return Trace(
        name=trace.name,
        arrival_s=arrival_s[kept],
        input_tokens=inputs[kept],
        output_tokens=outputs[kept],
    )


def main() -> None:
    """Read, cut, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--duration-s", type=float, default=200.0)
    parser.add_argument("--most-tokens", type=int, default=120_000)
    args = parser.parse_args()
    made = part(
        read_trace(args.trace),
        load_coefficients(args.gpu, args.model),
        load=args.load,
        duration_s=args.duration_s,
        most_tokens=args.most_tokens,
    )
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("arrival_s", "input_tokens", "output_tokens"))
        for row in zip(made.arrival_s, made.input_tokens, made.output_tokens, strict=True):
            writer.writerow((round(float(row[0]), 4), int(row[1]), int(row[2])))
    print(f"{len(made.arrival_s)} requests in {args.out}")


if __name__ == "__main__":
    main()

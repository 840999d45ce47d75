"""Hand-over with KV between two vLLM engines of this host: is it right, what does it cost, from where does it pay.

    python -m bench.kv_handover [--dtype float32] [--cuts 60] [--lengths 128,1000,...] [--repeats 5] [--model DIR]

`soak` cuts random requests at random points, moves them to and fro, breaks some of the segments on the way, and
compares with an uncut run, token by token: one whose prompt is in the prefix cache, as it is for the request that
is cut. Beside it stands what the data type does by itself: that run against one that prefilled the prompt.
`timing` holds cut and load against prefilling again on an idle engine.
One engine per core. vLLM writes its own lines to the standard output, so the figures go to a file: `--json FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l4queue.models import SamplingParams
from workers.engine.base import EngineRequest
from workers.engine.vllm.engine import VllmEngine
from workers.kv.store import default_directory
from workers.tiny import build_tiny_model

MAX_MODEL_LEN = 12_288
MAX_BATCHED_TOKENS = 2048
OUTPUT_TOKENS = 48
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
FAULTS = ("flip", "truncate", "delete", "garbage")


@dataclass(slots=True, kw_only=True)
class Running:
    """One engine and the output that has come out of it."""

    engine: VllmEngine
    name: str
    num_added: int = 0

    async def add(self, ids: list[int], num_tokens: int, *, kv: str = "") -> str:
        """Start a request; its id."""
        self.num_added += 1
        request_id = f"{self.name}-{self.num_added}"
        await self.engine.add(
            EngineRequest(
                request_id=request_id,
                token_ids=ids,
                max_tokens=num_tokens,
                min_tokens=0,
                params=GREEDY,
                kv=kv,
            )
        )
        return request_id

    async def read(self, *, at_least: int) -> list[int]:
        """Wait for this many tokens of the only request; there may be more."""
        ids: list[int] = []
        while len(ids) < at_least:
            for output in await self.engine.outputs():
                if output.error is not None:
                    raise RuntimeError(output.error)
                ids.extend(output.token_ids)
        return ids


def prompt(rng: np.random.Generator, num_tokens: int) -> list[int]:
    """Token ids that no other prompt begins with."""
    return [int(token) for token in rng.integers(10, 8000, num_tokens)]


def break_segment(path: Path, fault: str, rng: np.random.Generator) -> None:
    """Do to a finished segment what must never matter."""
    size = path.stat().st_size
    if fault == "delete":
        path.unlink()
    elif fault == "truncate":
        os.truncate(path, int(rng.integers(0, size)))
    elif fault == "garbage":
        path.write_bytes(rng.bytes(size))
    else:
        with path.open("r+b") as file:
            # of the payload's blocks in use: the rest of the file is padding
            file.seek(size - 1 - int(rng.integers(0, size // 4)))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x10]))


async def soak(
    pair: list[Running],
    directory: Path,
    *,
    num_cuts: int,
    max_prompt: int,
    faults: float,
    rng: np.random.Generator,
) -> dict[str, object]:
    """Chains of cuts. Every chain must give the tokens of the uncut run."""
    cuts = with_kv = broken = num_requests = 0
    different = {"all_loaded": 0, "some_prefilled": 0, "uncut_again": 0}
    chains = {"all_loaded": 0, "some_prefilled": 0}
    lengths: list[int] = []
    while cuts < num_cuts:
        is_long = rng.random() < 0.25
        low = max_prompt / 2 if is_long else 16
        ids = prompt(rng, int(np.exp(rng.uniform(np.log(low), np.log(max_prompt)))))
        num_requests += 1
        await pair[0].add(ids, OUTPUT_TOKENS)
        first = await pair[0].read(at_least=OUTPUT_TOKENS)
        await pair[0].add(ids, OUTPUT_TOKENS)
        whole = await pair[0].read(at_least=OUTPUT_TOKENS)
        different["uncut_again"] += first != whole
        broken_before = broken
        output: list[int] = []
        kv = ""
        points = sorted(int(p) for p in rng.choice(np.arange(1, OUTPUT_TOKENS - 8), size=3, replace=False))
        for hop, point in enumerate(points):
            here = pair[hop % 2]
            request_id = await here.add(ids + output, OUTPUT_TOKENS - len(output), kv=kv)
            output += await here.read(at_least=max(1, point - len(output)))
            if len(output) >= OUTPUT_TOKENS:
                break
            cut = await here.engine.cut(request_id)
            if cut is None:
                raise RuntimeError("nothing to cut")
            cuts += 1
            kv = cut.kv
            with_kv += bool(kv)
            lengths.append(len(ids) + len(output))
            if kv and rng.random() < faults:
                broken += 1
                break_segment(directory / f"{kv}.kv", str(rng.choice(FAULTS)), rng)
        if len(output) < OUTPUT_TOKENS:
            there = pair[len(points) % 2]
            await there.add(ids + output, OUTPUT_TOKENS - len(output), kv=kv)
            output += await there.read(at_least=OUTPUT_TOKENS - len(output))
        kind = "all_loaded" if broken == broken_before else "some_prefilled"
        chains[kind] += 1
        different[kind] += output != whole
    return {
        "requests": num_requests,
        "cuts": cuts,
        "with_kv": with_kv,
        "broken_on_purpose": broken,
        "chains": chains,
        "outputs_that_differ": different,
        "length_tokens": [min(lengths), int(statistics.median(lengths)), max(lengths)],
        "loads": [running.engine.stats().num_kv_loads for running in pair],
        "misses": [running.engine.stats().num_kv_misses for running in pair],
        "left_in_directory": sorted({path.name for path in directory.iterdir()} - {"lock", "tenants"}),
    }


async def timing(
    pair: list[Running], directory: Path, *, lengths: list[int], repeats: int, rng: np.random.Generator
) -> list[dict[str, float]]:
    """Medians of: prefilling a fresh prompt; cutting one of that length; going on with its KV elsewhere."""
    source, target = pair
    rows = []
    for length in lengths:
        prefills, cut_ms, resumes, sizes = [], [], [], []
        for _ in range(repeats):
            start_s = time.perf_counter()
            await target.add(prompt(rng, length), 1)
            await target.read(at_least=1)
            prefills.append((time.perf_counter() - start_s) * 1000)

            ids = prompt(rng, length)
            request_id = await source.add(ids, OUTPUT_TOKENS)
            ids = ids + await source.read(at_least=4)
            start_s = time.perf_counter()
            cut = await source.engine.cut(request_id)
            cut_ms.append((time.perf_counter() - start_s) * 1000)
            if cut is None or not cut.kv:
                raise RuntimeError("no KV was kept")
            sizes.append((directory / f"{cut.kv}.kv").stat().st_size)
            start_s = time.perf_counter()
            await target.add(ids, 1, kv=cut.kv)
            await target.read(at_least=1)
            resumes.append((time.perf_counter() - start_s) * 1000)
        moved = statistics.median(c + r for c, r in zip(cut_ms, resumes, strict=True))
        rows.append(
            {
                "length_tokens": length,
                "segment_bytes": statistics.median(sizes),
                "prefill_ms": round(statistics.median(prefills), 1),
                "cut_ms": round(statistics.median(cut_ms), 1),
                "load_to_first_token_ms": round(statistics.median(resumes), 1),
                "moved_ms": round(moved, 1),
            }
        )
    return rows


def break_even(rows: list[dict[str, float]]) -> int | None:
    """The least measured length from which on moving the KV is always faster."""
    found = None
    for row in reversed(rows):
        if row["moved_ms"] >= row["prefill_ms"]:
            break
        found = int(row["length_tokens"])
    return found


async def run(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Two engines, both measurements."""
    import torch
    import vllm

    rng = np.random.default_rng(options.seed)
    directory = default_directory(f"bench-{os.getpid()}")
    pair: list[Running] = []
    report: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "dtype": options.dtype,
        "seed": options.seed,
    }
    try:
        model = options.model or str(build_tiny_model(scratch))
        for number in range(2):
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(number % (os.cpu_count() or 1))
            engine = VllmEngine(
                model,
                max_model_len=MAX_MODEL_LEN,
                max_running=16,
                dtype=options.dtype,
                max_batched_tokens=MAX_BATCHED_TOKENS,
                kv_directory=directory,
            )
            info = await engine.start()
            pair.append(Running(engine=engine, name=f"engine{number}"))
        report["kv_bytes_per_token"] = info.kv_bytes_per_token
        if options.cuts:
            report["soak"] = await soak(
                pair,
                directory,
                num_cuts=options.cuts,
                max_prompt=options.max_prompt,
                faults=options.faults,
                rng=rng,
            )
        if options.lengths:
            lengths = sorted(int(part) for part in options.lengths.split(","))
            rows = await timing(pair, directory, lengths=lengths, repeats=options.repeats, rng=rng)
            report["timing"] = rows
            report["break_even_tokens"] = break_even(rows)
    finally:
        for running in pair:
            await running.engine.stop()  # the last one removes the directory
    return report


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cuts", type=int, default=60)
    parser.add_argument("--max-prompt", type=int, default=12_000)
    parser.add_argument("--faults", type=float, default=0.25)
    parser.add_argument("--lengths", default="128,256,512,1000,2000,4000,8000,12000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="")
    parser.add_argument("--json", type=Path, default=Path("/dev/stdout"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options.json.write_text(json.dumps(asyncio.run(run(options, Path(scratch))), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Times vLLM's steps on this GPU for batches that are known exactly, and what moving KV costs.

    python -m bench.gpu.steps --model llama-3.1-8b --models-dir DIR --out steps.json.gz [--limit-s 400]

Without a GPU it runs on vLLM's CPU build (`--model tiny --scale 0.02`), to try it. The model has random weights of
that shape. Needs vLLM and l4queue, nothing else. `bench.gpu.coefficients` makes a coefficient file of the output.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.engine import SteppedEngine
from bench.gpu.model import SHAPES, build_random_model

DECODE_STEPS = 16
CONTEXTS_TOKENS = (256, 1024, 4096, 16_384, 32_768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
LONG_TOKENS = (8_192, 32_768, 98_304)
PROMPTS_TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768)


class Sweep:
    """The measurements, one after the other; `scale` shortens every length, `deadline_s` ends them early."""

    def __init__(self, engine: SteppedEngine, *, scale: float, deadline_s: float) -> None:
        self.engine = engine
        self.scale = scale
        self.deadline_s = deadline_s
        self._rng = np.random.default_rng(7)

    def run(self) -> None:
        """All of them, as far as the time goes."""
        self.warm_up()
        for measure in (self.equal_contexts, self.one_long, self.mixtures, self.prefills, self.prefill_beside):
            start_s = time.perf_counter()
            for what in measure():
                print(f"{time.perf_counter() - start_s:7.1f} s  {measure.__name__}: {what}", flush=True)
                if time.perf_counter() > self.deadline_s:
                    print("time is up: the rest is left out", flush=True)
                    self.engine.drop_all()
                    return
            self.engine.drop_all()

    def warm_up(self) -> None:
        """Kernels are compiled and chosen at first use."""
        self.engine.phase = "warm-up"
        for num_requests, length in ((1, 300), (40, 300), (1, 9000)):
            self.engine.add(num_requests, self._length(length))
            self.engine.settle()
            self.engine.run(5)
            self.engine.drop_all()

    def equal_contexts(self) -> Iterator[str]:
        """Decode batches whose contexts are all of one length, growing; the prefills between are recorded too."""
        for context in CONTEXTS_TOKENS:
            yield from self._growing(self._length(context), BATCHES, phase="equal", beside=0)
            self.engine.drop_all()

    def one_long(self) -> Iterator[str]:
        """The same with one context that is much longer than the others."""
        for long in LONG_TOKENS:
            for short in (512, 2048):
                self.engine.phase = "prefill-long"
                self.engine.add(1, self._length(long))
                self.engine.settle()
                batches = (3, 7, 15, 31, 63, 127)
                yield from self._growing(self._length(short), batches, phase="one-long", beside=self._length(long))
                self.engine.drop_all()

    def mixtures(self) -> Iterator[str]:
        """Log-normal contexts: what a queue without regard to length puts together."""
        for num_requests in (16, 64, 128):
            for sigma in (0.5, 1.0, 1.5):
                lengths = np.exp(self._rng.normal(np.log(1500), sigma, num_requests)).clip(16, 60_000)
                if lengths.sum() * self.scale > 0.9 * self.engine.kv_capacity_tokens:
                    continue
                self.engine.phase = "mixture"
                for length in lengths:
                    self.engine.add(1, self._length(float(length)))
                self.engine.settle()
                self.engine.run(DECODE_STEPS)
                yield f"{num_requests} contexts, sigma {sigma}, {self._last_ms():.2f} ms a step"
                self.engine.drop_all()

    def prefills(self) -> Iterator[str]:
        """Prompts alone, and several short ones in a step."""
        for repeat in range(3):
            for length in PROMPTS_TOKENS:
                for count in {1, min(8, max(1, 8192 // length))}:
                    self.engine.phase = "prefill"
                    self.engine.add(count, self._length(length), max_tokens=1)
                    self.engine.drain()
            yield f"round {repeat + 1}"

    def prefill_beside(self) -> Iterator[str]:
        """Prompts that arrive while others decode."""
        for num_requests, context in ((16, 512), (64, 1024), (128, 1024), (24, 8192)):
            self.engine.phase = "prefill-base"
            self.engine.add(num_requests, self._length(context))
            self.engine.settle()
            for _ in range(2):
                for length in PROMPTS_TOKENS:
                    self.engine.phase = "prefill-beside"
                    self.engine.add(1, self._length(length), max_tokens=2)
                    self.engine.settle()
                    self.engine.run(3)
            yield f"beside {num_requests} of {context}"
            self.engine.drop_all()

    def _growing(self, length: int, batches: tuple[int, ...], *, phase: str, beside: int) -> Iterator[str]:
        has = 0
        for num_requests in batches:
            if beside + num_requests * (length + 400) > 0.95 * self.engine.kv_capacity_tokens:
                break
            self.engine.phase = f"prefill-{phase}"
            self.engine.add(num_requests - has, length)
            has = num_requests
            self.engine.settle()
            self.engine.phase = phase
            self.engine.run(DECODE_STEPS)
            yield f"{num_requests} x {length} beside {beside}: {self._last_ms():.2f} ms a step"

    def _last_ms(self) -> float:
        return statistics.median(step.elapsed_ms for step in self.engine.steps[-DECODE_STEPS + 4 :])

    def _length(self, tokens: float) -> int:
        return max(8, round(tokens * self.scale))


def kv_moves(engine: SteppedEngine, *, scale: float) -> list[dict[str, float]]:
    """Copying a request's KV from the engine's cache into a segment in shared memory and back, medians of 3."""
    from workers.kv.blocks import block_rows
    from workers.kv.copier import KVCopier, LoadJob, SaveJob
    from workers.kv.store import SegmentStore, new_ticket

    caches = _kv_caches(engine)
    rows = []
    with tempfile.TemporaryDirectory(prefix="l4-kv-", dir="/dev/shm") as folder:
        store = SegmentStore(Path(folder), limit_bytes=16 << 30)
        block_tokens = int(engine.config.cache_config.block_size)
        carrier = KVCopier(store, block_rows(caches), fingerprint="bench", block_tokens=block_tokens)
        for length in (1024, 4096, 16_384):
            num_tokens = max(block_tokens, round(length * scale))
            blocks = [int(b) for b in np.random.default_rng(3).permutation(num_tokens // block_tokens) + 1]
            saves, loads, size = [], [], 0
            for _ in range(3):
                ticket = new_ticket()
                start_s = time.perf_counter()
                tokens = list(range(len(blocks) * block_tokens))
                carrier.submit(SaveJob(request_id=ticket, ticket=ticket, token_ids=tokens, block_ids=blocks))
                while not carrier.results(wait_s=1.0).saved:
                    pass
                saves.append((time.perf_counter() - start_s) * 1000)
                size = store.path(ticket).stat().st_size
                start_s = time.perf_counter()
                carrier.submit(LoadJob(request_id=ticket, ticket=ticket, first_block=0, block_ids=blocks))
                while not (results := carrier.results(wait_s=1.0)).loaded:
                    pass
                if results.failed:
                    raise RuntimeError("the segment could not be loaded")
                loads.append((time.perf_counter() - start_s) * 1000)
            rows.append(
                {
                    "length_tokens": len(blocks) * block_tokens,
                    "segment_bytes": size,
                    "save_ms": round(statistics.median(saves), 2),
                    "load_ms": round(statistics.median(loads), 2),
                }
            )
            print("KV", rows[-1], flush=True)
        carrier.close()
    return rows


def _kv_caches(engine: SteppedEngine) -> dict[str, Any]:
    """The layers' caches with blocks along dimension 0, as vLLM registers them with a connector."""
    num_blocks = int(engine.config.cache_config.num_gpu_blocks)
    worker = engine.core.model_executor.driver_worker
    caches = getattr(worker, "worker", worker).model_runner.kv_caches
    found = {}
    for number, cache in enumerate(caches):
        tensor = cache[0] if isinstance(cache, list | tuple) else cache
        found[str(number)] = tensor if tensor.shape[0] == num_blocks else tensor.transpose(0, 1)
    return found


def machine() -> dict[str, str]:
    """Hardware and versions."""
    import torch
    import vllm

    facts = {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return facts


def main() -> None:
    """Measure, and write everything that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--models-dir", type=Path, default=Path(tempfile.gettempdir()) / "l4queue-models")
    parser.add_argument("--out", type=Path, default=Path("steps.json.gz"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--max-batched-tokens", type=int, default=8192)
    parser.add_argument("--limit-s", type=float, default=480.0, help="measure no longer than this")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    args = parser.parse_args()
    model = build_random_model(args.model, args.models_dir)
    print(f"model {model}", flush=True)
    max_model_len = min(SHAPES[args.model]["max_position_embeddings"], 131_072)
    more: dict[str, Any] = {"enforce_eager": True} if args.eager else {}
    engine = SteppedEngine(
        str(model),
        max_model_len=max_model_len,
        max_batched_tokens=args.max_batched_tokens,
        seed=1,
        **more,
    )
    print(f"KV capacity {engine.kv_capacity_tokens} tokens", flush=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "model": args.model,
        "max_batched_tokens": args.max_batched_tokens,
        "max_num_seqs": 256,
        "kv_capacity_tokens": engine.kv_capacity_tokens,
        "async_scheduling": bool(engine.config.scheduler_config.async_scheduling),
        "eager": bool(engine.config.model_config.enforce_eager),
    }
    try:
        try:
            result["kv_moves"] = kv_moves(engine, scale=args.scale)
        except Exception as error:  # the steps are worth having without it
            print(f"KV was not moved: {error!r}", flush=True)
        Sweep(engine, scale=args.scale, deadline_s=time.perf_counter() + args.limit_s).run()
    finally:
        result["steps"] = [asdict(step) for step in engine.steps if step.phase != "warm-up"]
        with gzip.open(args.out, "wt", encoding="utf-8") as file:
            json.dump(result, file)
        print(f"{len(result['steps'])} steps in {args.out}", flush=True)


if __name__ == "__main__":
    main()

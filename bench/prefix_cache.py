"""Prefix cache hits of the simulator beside those of vLLM: the same requests, added at the same steps.

    python bench/prefix_cache.py [--cases BLOCKS:TOGETHER:REQUESTS,...] [--scheduler-only] [--seed 0] [--json]

The tiny model runs on the CPU. Conversations grow by what the model answered, share system prompts, and now and
then repeat a prompt as it was. A case is a size of the KV cache, a number of requests at a time, and one in all.
The simulated engine has steps of 1 ms, so that a request comes at the same step to both. With `--scheduler-only`
vLLM's scheduler and block pool run without the model, and tokens are drawn: what is cached hangs on them alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np

from l4queue.cost.step import StepCost
from l4queue.sim.cluster import Cluster
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.length_blind import RoundRobin
from l4queue.sim.traces.content import Chains

BLOCK_TOKENS = 32  # the least of vLLM on CPUs
MAX_MODEL_LEN = 2_048
MAX_OUTPUT_TOKENS = 24
MAX_BATCHED_TOKENS = 256
MAX_RUNNING = 8


@dataclass(kw_only=True)
class Turn:
    """A request as it ran in vLLM: the step that it was added before, its tokens, and what was found of it."""

    at_step: int
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    cached_tokens: int = -1


def engine_options(model: str, *, num_blocks: int) -> Any:
    """vLLM's configuration as workers make it, with so many KV blocks beside the one that it never uses."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    from workers.engine.vllm.configure import VllmOptions, engine_config

    arguments = f"--block-size {BLOCK_TOKENS} --num-gpu-blocks-override {num_blocks + 1} --no-async-scheduling"
    return engine_config(
        VllmOptions(
            model=model,
            max_model_len=MAX_MODEL_LEN,
            max_running=MAX_RUNNING,
            max_batched_tokens=MAX_BATCHED_TOKENS,
            tensor_parallel=1,
            dtype="float32",
            gpu_memory_share=0.03,
            vllm_args=arguments,
        )
    )


class Engine:
    """A vLLM engine in this process, which is told of requests and makes steps."""

    def __init__(self, model: str, *, num_blocks: int) -> None:
        config = engine_options(model, num_blocks=num_blocks)
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_vllm_config(config)

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self._engine.reset_prefix_cache()

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        """A request for the next step."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[str, int, list[int]]]:
        """Requests that ended in a step: name, tokens that were cached, output."""
        return [
            (result.request_id, result.num_cached_tokens, list(result.outputs[0].token_ids))
            for result in self._engine.step()
            if result.finished
        ]


class SchedulerAlone:
    """vLLM's scheduler and block pool without a model: the tokens are drawn."""

    def __init__(self, model: str, *, num_blocks: int) -> None:
        config = engine_options(model, num_blocks=num_blocks)
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config.cache_config.num_gpu_blocks = num_blocks + 1
        self._scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        self._rng = np.random.default_rng(0)
        self._running: dict[str, Any] = {}
        self._cached: dict[str, int] = {}

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self._scheduler.reset_prefix_cache()

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        """A request for the next step."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._running[name] = request = Request(
            name, prompt, params, pooling_params=None, block_hasher=self._hasher
        )
        self._scheduler.add_request(request)

    def step(self) -> list[tuple[str, int, list[int]]]:
        """Requests that ended in a step: name, tokens that were cached, output."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduled = self._scheduler.schedule()
        names = list(scheduled.num_scheduled_tokens)
        requests = [self._running[name] for name in names]
        drawn = [
            [int(self._rng.integers(10, 8000))] if r.num_computed_tokens >= r.num_tokens else [] for r in requests
        ]
        cached = {name: self._running[name].prefill_stats for name in names}
        made = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, drawn)
        self._scheduler.update_from_output(scheduled, made)
        for name in names:
            stats = cached[name]
            if stats is not None:
                self._cached[name] = stats.num_local_cached_tokens
        ended = [name for name in names if self._running[name].is_finished()]
        return [(name, self._cached[name], list(self._running.pop(name).output_token_ids)) for name in ended]


class Script:
    """Conversations for an engine: who comes next, and with which tokens. `together`: how many at a time."""

    def __init__(self, *, num_requests: int, together: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._left = num_requests
        self._together = together
        self._systems = [self._text(n) for n in (160, 100, 37)]
        self._idle: list[list[int]] = []

    def _text(self, number: int) -> list[int]:
        return [int(token) for token in self._rng.integers(10, 8000, number)]

    def next(self, num_running: int) -> list[int] | None:
        """The next prompt; None where nobody comes now."""
        if not self._left or num_running >= self._together:
            return None
        self._left -= 1
        draw = self._rng.random()
        if self._idle and draw < 0.7:
            text = self._idle.pop(int(self._rng.integers(len(self._idle))))
            return text if draw < 0.1 else text + self._text(int(self._rng.integers(1, 120)))
        system = self._systems[int(self._rng.integers(len(self._systems)))]
        return system + self._text(int(self._rng.integers(1, 400)))

    def ended(self, turn: Turn) -> None:
        """A conversation may go on, unless it is abandoned or too long."""
        text = turn.prompt + turn.output
        if len(text) < MAX_MODEL_LEN - 300 and self._rng.random() < 0.85:
            self._idle.append(text)

    @property
    def is_over(self) -> bool:
        return not self._left


def play(core: Engine | SchedulerAlone, script: Script, *, rng: np.random.Generator) -> list[Turn]:
    """Run the conversations in vLLM, step by step; returns all requests in the order in which they came."""
    turns: list[Turn] = []
    running: dict[str, Turn] = {}
    step = 0
    core.forget()
    while running or not script.is_over:
        prompt = script.next(len(running))
        while prompt is not None:
            name, turn = str(len(turns)), Turn(at_step=step, prompt=prompt)
            core.add(name, prompt, int(rng.integers(1, MAX_OUTPUT_TOKENS)))
            turns.append(turn)
            running[name] = turn
            prompt = script.next(len(running))
        for name, cached_tokens, output in core.step():
            turn = running.pop(name)
            turn.cached_tokens, turn.output = cached_tokens, output
            script.ended(turn)
        step += 1
    return turns


def simulate(turns: list[Turn], *, num_blocks: int) -> list[SimRequest]:
    """The same requests on a simulated engine whose steps take 1 ms."""
    cost = StepCost(
        alpha_ms=1.0,
        beta_ms=0.0,
        gamma_ms=0.0,
        pi_ms=0.0,
        psi_ms=0.0,
        kv_capacity_tokens=num_blocks * BLOCK_TOKENS,
        max_batched_tokens=MAX_BATCHED_TOKENS,
        max_num_seqs=MAX_RUNNING,
    )
    chains = Chains(BLOCK_TOKENS, block_tokens=BLOCK_TOKENS)
    known: dict[tuple[int, ...], int] = {}
    requests = []
    for index, turn in enumerate(turns):
        text = turn.prompt + turn.output
        whole = len(text) - len(text) % BLOCK_TOKENS
        parts = [tuple(text[at : at + BLOCK_TOKENS]) for at in range(0, whole, BLOCK_TOKENS)]
        ids = [known.setdefault(part, len(known)) for part in parts]
        chain = chains.chain(ids, prompt_tokens=whole, output_tokens=0)
        requests.append(
            SimRequest(
                index,
                max(0.0, turn.at_step - 0.5) / 1000.0,
                prompt_tokens=len(turn.prompt),
                output_tokens=len(turn.output),
                chain=chain,
            )
        )
    Cluster(
        requests,
        cost=cost,
        num_instances=1,
        policy=RoundRobin(),
        rng=np.random.default_rng(0),
        block_tokens=BLOCK_TOKENS,
    ).run()
    return requests


def num_equal(turns: list[Turn], requests: list[SimRequest]) -> int:
    """Requests of which both found as many tokens."""
    return sum(t.cached_tokens == r.cached_tokens for t, r in zip(turns, requests, strict=True))


def compare(
    folder: str, num_blocks: int, cases: list[tuple[int, int]], *, seed: int, has_model: bool
) -> list[dict[str, float]]:
    """The rows of one size of the cache, for so many requests at a time and in all."""
    from workers.tiny import build_tiny_model

    core = (Engine if has_model else SchedulerAlone)(str(build_tiny_model(folder)), num_blocks=num_blocks)
    rows: list[dict[str, float]] = []
    for together, num_requests in cases:
        script = Script(num_requests=num_requests, together=together, seed=seed)
        turns = play(core, script, rng=np.random.default_rng(seed))
        requests = simulate(turns, num_blocks=num_blocks)
        real, simulated = (sum(t.cached_tokens for t in turns), sum(r.cached_tokens or 0 for r in requests))
        rows.append(
            {
                "kv_blocks": num_blocks,
                "together": together,
                "requests": len(turns),
                "prompt_tokens": sum(len(t.prompt) for t in turns),
                "cached_vllm": real,
                "cached_simulated": simulated,
                "difference": round(simulated / max(1, real) - 1.0, 4),
                "requests_equal": num_equal(turns, requests),
                "preemptions_simulated": sum(r.num_preemptions for r in requests),
            }
        )
    return rows


def main() -> None:
    """Compare all cases; each size of the cache has a process, as vLLM has one engine in each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="1000:1:40,1000:6:80,250:6:80,160:6:80,100:4:80")
    parser.add_argument("--scheduler-only", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    by_size: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for case in given.cases.split(","):
        num_blocks, together, num_requests = map(int, case.split(":"))
        by_size[num_blocks].append((together, num_requests))
    rows: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as process,
    ):
        for num_blocks, cases in by_size.items():
            has_model = not given.scheduler_only
            found = process.submit(
                compare, folder, num_blocks, cases, seed=given.seed, has_model=has_model
            ).result()
            rows += found
            for row in [] if given.json else found:
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if given.json:
        print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()

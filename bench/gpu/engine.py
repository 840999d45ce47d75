"""vLLM's engine core in this process, stepped by hand, so that the batch of every timed step is known exactly."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ("Step", "SteppedEngine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One engine step: what was in its batch, with the features of `l4queue.cost.step`, and how long it took.

    `phase` names the measurement it was part of, `longest_tokens` is the longest context among its decodes.
    """

    phase: str
    elapsed_ms: float
    num_decodes: int
    context_tokens: int
    longest_tokens: int
    prefill_tokens: int
    prefill_pairs: float

    @property
    def skew_tokens(self) -> float:
        """How far the longest context stands out: n·(longest - mean)."""
        return float(self.num_decodes * self.longest_tokens - self.context_tokens)


class SteppedEngine:
    """The core as vLLM's own process runs it (asynchronous scheduling, CUDA graphs), without a front end.

    Prefix caching is off: all blocks of all requests are different ones, as the contexts of unlike requests are.
    """

    def __init__(self, model: str, *, max_model_len: int, max_batched_tokens: int, seed: int, **more: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the core in this process
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = EngineArgs(
            model=model,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_batched_tokens,
            max_num_seqs=256,
            dtype="bfloat16",
            enable_prefix_caching=False,
            disable_log_stats=True,
            **more,
        )
        self._front = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
        self.core: Any = self._front.engine_core.engine_core
        self.config: Any = self._front.vllm_config
        self.steps: list[Step] = []
        self.phase = ""
        self._rng = np.random.default_rng(seed)
        self._vocabulary = int(self.config.model_config.get_vocab_size())
        self._num_added = 0
        self._names: list[str] = []
        self._sent: dict[int, tuple[float, dict[str, float]]] = {}  # by identity of the scheduler's output
        self._last_s = 0.0
        scheduler = self.core.scheduler
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        scheduler.schedule, scheduler.update_from_output = self._watch_schedule, self._watch_update

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that fit into its KV cache."""
        cache = self.config.cache_config
        return int(cache.num_gpu_blocks) * int(cache.block_size)

    def add(self, num_requests: int, num_tokens: int, *, max_tokens: int = 4000) -> None:
        """Requests with random prompts of this length. They decode until dropped or through `max_tokens`."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        for _ in range(num_requests):
            self._num_added += 1
            prompt = [int(token) for token in self._rng.integers(10, self._vocabulary, num_tokens)]
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
            name = str(self._num_added)
            self._front.add_request(name, tokens_input(prompt), params)
            self._names.append(name)

    def run(self, num_steps: int) -> None:
        """Take this many steps."""
        until = len(self.steps) + num_steps
        while len(self.steps) < until:
            self._step()

    def settle(self) -> None:
        """Step until every request has its first token."""
        requests = self.core.scheduler.requests
        while any(r.num_computed_tokens < r.num_prompt_tokens for r in requests.values()) or self._is_prefilling():
            self._step()

    def drop_all(self) -> None:
        """Abort everything and let the pipeline run empty."""
        self._front.abort_request(self._names)
        self.drain()

    def drain(self) -> None:
        """Step until every request is through."""
        self._names = []
        while self.core.scheduler.has_requests() or self.core.batch_queue:
            self._step()

    def _is_prefilling(self) -> bool:
        return any(batch["prefill_tokens"] > 0 for _, batch in self._sent.values())

    def _step(self) -> None:
        _, executed = self.core.step_fn()
        self.core.post_step(executed)

    def _watch_schedule(self, *args: Any, **kwargs: Any) -> Any:
        since_s = time.perf_counter()
        output = self._schedule(*args, **kwargs)
        requests = self.core.scheduler.requests
        parts = [
            (requests[name].num_computed_tokens - count, count, requests[name].num_prompt_tokens)
            for name, count in output.num_scheduled_tokens.items()
        ]
        self._sent[id(output)] = (since_s, _features(parts))
        return output

    def _watch_update(self, scheduler_output: Any, model_output: Any) -> Any:
        """A batch is back from the GPU: it began when it was scheduled, or when the one before it was back."""
        now_s = time.perf_counter()
        since_s, batch = self._sent.pop(id(scheduler_output))
        if batch["num_decodes"] or batch["prefill_tokens"]:
            elapsed_ms = (now_s - max(since_s, self._last_s)) * 1000
            self.steps.append(Step(phase=self.phase, elapsed_ms=elapsed_ms, **batch))  # type: ignore[arg-type]
        self._last_s = now_s
        return self._update(scheduler_output, model_output)


def _features(parts: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """Of a batch, given (tokens computed before, tokens in this step, prompt tokens) for each of its requests."""
    contexts = [before for before, _, prompt in parts if before >= prompt]
    chunks = [(before, count) for before, count, prompt in parts if before < prompt]
    return {
        "num_decodes": len(contexts),
        "context_tokens": sum(contexts),
        "longest_tokens": max(contexts, default=0),
        "prefill_tokens": sum(count for _, count in chunks),
        "prefill_pairs": sum(count * (before + count / 2) for before, count in chunks),
    }

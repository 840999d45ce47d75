"""vLLM's CPU worker, with chunked prefill of seeded requests repaired and the lowest rank at its core."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from vllm.v1.worker.cpu_worker import CPUWorker

__all__ = ("SeededCpuWorker",)

_NICENESS = 10
"""The engine fills its core. What hands it work and takes its tokens shares that core, needs little and is first:
with two engines on two cores means fell by a quarter at 13 requests/s, under least-loaded and under l4."""


class SeededCpuWorker(CPUWorker):  # type: ignore[misc]
    """Draws nothing from a request's own generator for the token behind a chunk, which is thrown away.

    vLLM 0.32 draws it and turns the generator back, which those of CPUs cannot: the engine dies of "CPU Generator
    does not use offset". Left out, the tokens do not depend on how the prompt was cut, as they do not on a GPU.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        os.nice(_NICENESS)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's, with the generators of unfinished prompts put aside."""
        runner = self.model_runner
        generators = runner.input_batch.generators
        unfinished = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs]).tolist()
        aside = {index: generators.pop(index) for index in unfinished if index in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(aside)

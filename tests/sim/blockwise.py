"""An oracle for engines with prefix caches: vLLM's pool block by block, and its loop step by step."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from l4queue.cost.step import BLOCK_TOKENS, BatchShape, StepCost

__all__ = ("BlockwiseEngine", "Job")


@dataclass(eq=False)
class Block:
    content: int | None = None
    refs: int = 0


class BlockPool:
    """vLLM's pool, block by block: a queue of free blocks and a table of those whose content is known."""

    def __init__(self, number: int) -> None:
        self.free = deque(Block() for _ in range(number))
        self.known: dict[int, Block] = {}

    def new(self) -> Block:
        block = self.free.popleft()
        if block.content is not None and self.known.get(block.content) is block:
            del self.known[block.content]
        block.content, block.refs = None, 1
        return block

    def touch(self, block: Block) -> None:
        if not block.refs:
            self.free.remove(block)
        block.refs += 1

    def release(self, blocks: list[Block]) -> None:
        for block in reversed(blocks):
            block.refs -= 1
            if block.refs:
                continue
            if block.content is None:
                self.free.appendleft(block)
            else:
                self.free.append(block)


@dataclass(eq=False)
class Job:
    arrival_s: float
    prompt: int
    output: int
    content: list[int]
    generated: int = 0
    computed: int = 0
    target: int = 0
    blocks: list[Block] = field(default_factory=list)
    cached: int | None = None
    first_s: float = math.nan
    finish_s: float = math.nan
    preemptions: int = 0

    @property
    def length(self) -> int:
        return self.prompt + self.generated


class BlockwiseEngine:
    """vLLM's loop, one step and one block at a time.

    A prompt gets all of its blocks when it is admitted. The blocks of an output are known when the request leaves.
    """

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self.total = cost.kv_capacity_tokens // BLOCK_TOKENS
        self.pool = BlockPool(self.total)
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()

    def free(self, job: Job) -> None:
        self.learn(job)
        self.pool.release(job.blocks)
        job.blocks, job.computed = [], 0

    def learn(self, job: Job) -> None:
        """Full blocks become known; content that is known already stays where it is."""
        for at in range(job.computed // BLOCK_TOKENS):
            block, content = job.blocks[at], job.content[at]
            if block.content is None:
                block.content = content
                self.pool.known.setdefault(content, block)

    def hits(self, job: Job) -> list[Block]:
        found = []
        for content in job.content[: (job.length - 1) // BLOCK_TOKENS]:
            if content not in self.pool.known:
                break
            found.append(self.pool.known[content])
        return found

    def step(self, now_s: float) -> float:
        has_preempted = False
        decodes = [job for job in self.running if job.computed >= job.target]
        while (
            sum(-(-job.length // BLOCK_TOKENS) - len(job.blocks) for job in decodes) > len(self.pool.free)
            and len(self.running) > 1
        ):
            job = self.running.pop()
            self.free(job)
            job.preemptions += 1
            self.waiting.appendleft(job)
            decodes = [job for job in decodes if job in self.running]
            has_preempted = True
        for job in decodes:
            while len(job.blocks) < -(-job.length // BLOCK_TOKENS):
                job.blocks.append(self.pool.new())
        budget = self.cost.max_batched_tokens - len(decodes)
        share = budget if len(self.running) + len(self.waiting) == 1 else self.cost.max_chunk_tokens
        chunks: list[tuple[Job, int, int]] = []

        def prefill(job: Job) -> None:
            nonlocal budget
            chunk = min(budget, share, job.target - job.computed)
            chunks.append((job, chunk, job.computed))
            job.computed += chunk
            self.learn(job)
            budget -= chunk

        for job in self.running:
            if job not in decodes and budget > 0:
                prefill(job)
        while self.waiting and budget > 0 and not has_preempted and len(self.running) < self.cost.max_num_seqs:
            job = self.waiting[0]
            hits = self.hits(job)
            needed = -(-job.length // BLOCK_TOKENS) - sum(block.refs > 0 for block in hits)
            if needed > len(self.pool.free) and self.running:
                break
            self.waiting.popleft()
            for block in hits:
                self.pool.touch(block)
            job.blocks = list(hits)
            while len(job.blocks) < -(-job.length // BLOCK_TOKENS):
                job.blocks.append(self.pool.new())
            job.computed, job.target = len(hits) * BLOCK_TOKENS, job.length
            job.cached = job.computed if job.cached is None else job.cached
            self.running.append(job)
            prefill(job)
        lengths = [job.length for job in decodes]
        shape = BatchShape(
            num_decodes=len(lengths),
            context_tokens=sum(lengths),
            prefill_tokens=sum(chunk for _, chunk, _ in chunks),
            prefill_pairs=sum(chunk * (before + chunk / 2) for _, chunk, before in chunks),
            skew_tokens=len(lengths) * max(lengths) - sum(lengths) if lengths else 0,
        )
        end_s = now_s + self.cost.step_ms(shape) / 1000.0
        for job in decodes:
            job.computed += 1
        for job in decodes + [job for job, _, _ in chunks if job.computed >= job.target]:
            job.generated += 1
            if math.isnan(job.first_s):
                job.first_s = end_s
            if job.generated == job.output:
                job.finish_s = end_s
                self.running.remove(job)
                self.free(job)
        return end_s

    def run(self, jobs: list[Job]) -> None:
        left, now_s = deque(jobs), 0.0
        while left or self.running or self.waiting:
            while left and left[0].arrival_s <= now_s:
                self.waiting.append(left.popleft())
            if not self.running and not self.waiting:
                now_s = left[0].arrival_s
                continue
            now_s = self.step(now_s)
